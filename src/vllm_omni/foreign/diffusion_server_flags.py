"""Treatment of the flags of other diffusion servers: the public vllm-omni 0.30 and SGLang Diffusion."""

from __future__ import annotations

from vllm_omni.foreign.flags import ForeignFlag, ignored, refused, renamed

_OFFLOAD = "--enable-cpu-offload or --enable-layerwise-offload"
_OWN_FOLDER = "a model is loaded as its folder says"
_NO_STAGES = "one model is served, without stages; flags may come from --config FILE.yaml"

VLLM_OMNI_FLAGS: tuple[ForeignFlag, ...] = (
    *ignored(
        "always done, or done in another way with the same pictures",
        """
        --step-execution --request-batch-max-wait-ms= --enable-cache-dit-summary --log-stats --stage-init-timeout=
        --init-timeout= --batch-timeout= --shm-threshold-bytes= --disable-multithread-weight-load
        --num-weight-load-threads= --enable-broadcast-weight-load --ulysses-mode= --ulysses-a2a-permute
        --diffusion-compile-granularity= --diffusion-compile-dynamic --fa-deterministic --force-cutlass-fp8
        --enable-diffusion-pipeline-profiler --enable-orch-monitor --host-weight-runtime-mode=
        --host-weight-runtime-root= --dlo-host-registration-limit-gib=
        """,
    ),
    *renamed("--attention-backend", "--diffusion-attention-backend= --diffusion-attention-config/-dac="),
    *renamed("--quantization fp8", "--diffusion-quantization-config="),
    *renamed("--load-format", "--diffusion-load-format=", "default"),
    *renamed("--lora-modules NAME=PATH", "--lora-path=+"),
    *renamed(
        'a request\'s "lora": {"name": ..., "scale": ...}, or --default-sampling-params with a lora_request',
        "--lora-scale=",
    ),
    *renamed("--max-pixels", "--max-generated-image-size="),
    *renamed(
        "the product of --usp, --ring, --cfg-parallel-size, --tensor-parallel-size and --data-parallel-size",
        "--num-gpus=",
        "1",
    ),
    *renamed(_OFFLOAD, "--diffusion-offload-config= --enable-distributed-layerwise-offload"),
    *renamed(_OFFLOAD, "--dlo-use-allgather --dlo-no-use-allgather"),
    *renamed(_OFFLOAD, "--dlo-resident-layers=", "0"),
    *renamed("--tensor-parallel-size, which shares the weights", "--use-hsdp"),
    *renamed("--tensor-parallel-size, which shares the weights", "--hsdp-shard-size=", "1", "-1"),
    *renamed("--data-parallel-size", "--hsdp-replicate-size= --omni-dp-size-local=", "1"),
    *renamed("--usp and --ring", "--allgather-degree=", "1"),
    *renamed("--distributed-executor-backend", "--worker-backend=", "multi_process"),
    *renamed("--default-sampling-params", "--diffusers-call-kwargs=", "{}"),
    *renamed("flow_shift of a request, or --default-sampling-params with it", "--flow-shift="),
    *refused(_OWN_FOLDER, "--diffusers-load-kwargs=", "{}"),
    *refused(
        _OWN_FOLDER,
        "--model-class-name= --custom-pipeline-args= --auxiliary-text-encoder= --task-type= --boundary-ratio=",
    ),
    *refused("adapters are chosen by request and never fused into the weights", "--lora-backend=", "peft"),
    *refused(_NO_STAGES, "--deploy-config= --strategy-config= --stage-configs-path= --stage-overrides= --stage-id="),
    *refused(
        "a server and its workers run on one host",
        "--ray-address= --omni-master-address/-oma= --omni-master-port/-omp= --omni-replica-address/-ora=",
    ),
    *refused("logs go to stdout and stderr: redirect them", "--log-file="),
    *refused(
        "queries, keys and values keep the type of --dtype",
        "--diffusion-kv-cache-dtype= --diffusion-kv-cache-skip-steps= --diffusion-kv-cache-skip-layers=",
    ),
    *refused("a decode is shared by tiles", "--vae-parallel-mode=", "tile"),
    *refused(
        "a video is one file, encoded in this process; GET /v1/videos/{id}/events streams its progress and previews",
        "--diffusion-streaming-output --video-output-transport=",
    ),
)

SGLANG_FLAGS: tuple[ForeignFlag, ...] = (
    *ignored(
        "always done, or done in another way with the same pictures",
        "--pin-cpu-memory=? --enable-torch-compile=? --warmup=? --output-path= --scheduler-port=",
    ),
    *renamed("MODEL, as in `vllm serve MODEL --omni`", "--model-path="),
    *renamed("--tensor-parallel-size", "--tp-size/--tp=", "1"),
    *renamed("--data-parallel-size", "--dp-size/--dp=", "1"),
    *renamed("--usp and --ring", "--sp-degree/--sp-size=", "1"),
    *renamed("--cfg-parallel-size 2", "--enable-cfg-parallel=?", "false"),
    *renamed(
        "--enable-cpu-offload",
        "--dit-cpu-offload=? --text-encoder-cpu-offload=? --image-encoder-cpu-offload=? --vae-cpu-offload=?",
        "false",
    ),
    *renamed("--enable-layerwise-offload", "--dit-layerwise-offload=?", "false"),
    *renamed("--tensor-parallel-size, which shares the weights", "--use-fsdp-inference=?", "false"),
    *renamed("--vae-use-tiling", "--vae-tiling=?", "false"),
    *renamed("--vae-use-slicing", "--vae-slicing=?", "false"),
    *renamed("--dtype", "--dit-precision= --vae-precision= --text-encoder-precisions=+"),
    *renamed("--cache-backend cache_dit with --cache-config JSON", "--cache-dit-config="),
    *renamed(
        "--attention-backend",
        "--attention-backend-config= --diffusers-attention-backend= --component-attention-backends=",
    ),
    *renamed("--lora-modules NAME=PATH", "--lora-nickname="),
    *renamed("--transformer-file FILE", "--transformer-weights-path="),
    *refused("the path is chosen by the model: /v1/models says which", "--backend=", "auto"),
    *refused("the path is chosen by the model: /v1/models says which", "--model-type=", "auto", "diffusion"),
    *refused(
        _OWN_FOLDER,
        "--pipeline-class-name= --model-id= --transformer-path= --vae-path= --text-encoder-path=",
    ),
    *refused("adapters are chosen by request and never merged into the weights", "--lora-merge-mode=", "dynamic"),
)
