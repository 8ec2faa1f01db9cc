"""Treatment of every flag of `vllm serve` (vLLM 0.32): the same here, ignored, renamed or refused.

A flag is ignored only where the user gets the same pictures, limits, addresses and devices without it. A test compares
the names and the number of values with vLLM's own parser.
"""

from __future__ import annotations

from vllm_omni.foreign.flags import ForeignFlag, ignored, refused, renamed, words

SAME_HERE = words(
    """
    --allow-credentials --allowed-headers --allowed-local-media-path --allowed-media-domains --allowed-methods
    --allowed-origins --api-key --attention-backend --config --data-parallel-size --disable-access-log-for-endpoints
    --disable-fastapi-docs --disable-uvicorn-access-log --distributed-executor-backend --download-dir --dtype
    --enable-log-requests --enable-request-id-headers --enable-sleep-mode --enable-ssl-refresh --enforce-eager
    --gpu-memory-utilization --help --hf-token --host --load-format --lora-modules --max-cpu-loras --max-loras
    --max-num-queued-reqs --max-num-seqs --middleware --model --otlp-traces-endpoint --port --quantization --revision
    --root-path --scheduling-policy --seed --served-model-name --shutdown-timeout --sse-keep-alive-interval
    --ssl-ca-certs --ssl-certfile --ssl-ciphers --ssl-cert-reqs --ssl-keyfile --tensor-parallel-size --uds
    --uvicorn-log-level
    """
)
"""vLLM's flags that are ours too; values that only vLLM takes are refused like any wrong value."""

VLLM_FLAGS: tuple[ForeignFlag, ...] = (
    *ignored(
        "text: tokenizer, prompt templates, tools, reasoning, sampling of tokens",
        """
        --tokenizer= --tokenizer-mode= --tokenizer-revision= --skip-tokenizer-init --max-model-len= --generation-config=
        --override-generation-config= --runner= --convert= --model-impl= --pooler-config= --io-processor-plugin=
        --chat-template= --chat-template-content-format= --default-chat-template-kwargs= --trust-request-chat-template
        --response-role= --enable-auto-tool-choice --exclude-tools-when-tool-choice-none --tool-call-parser=
        --tool-parser-plugin= --tool-strict-level= --tool-server= --reasoning-parser= --reasoning-parser-plugin=
        --reasoning-config= --structured-outputs-config= --cohere-is-reasoning-model --cohere-format=
        --anthropic-disabled-thinking-effort= --return-tokens-as-token-ids --enable-tokenizer-info-endpoint
        --max-logprobs= --logprobs-mode= --use-fp64-gumbel --return-sampling-mask --logits-processors=+
        --enable-return-routed-experts --enable-trace-replay --enable-prompt-embeds --renderer-num-workers=
        --language-model-only --fingerprint-mode= --fingerprint-value= --aux-output-config= --speculative-config/-sc=
        --spec-method= --spec-model= --spec-tokens= --stream-interval= --engram-config=
        """,
    ),
    *ignored(
        "code beside the weights: never run, and a model that needs it is refused",
        "--trust-remote-code --code-revision=",
    ),
    *ignored(
        "pictures, videos and sound that a language model reads",
        """
        --trust-request-mm-kwargs --media-io-kwargs= --mm-processor-kwargs= --mm-processor-cache-gb=
        --mm-processor-cache-type= --mm-processor-device= --mm-hasher-algorithm= --mm-shm-cache-max-object-size-mb=
        --mm-encoder-only --mm-encoder-tp-mode= --mm-encoder-attn-backend= --mm-encoder-attn-dtype=
        --mm-encoder-fp8-scale-path= --mm-encoder-fp8-scale-save-path= --mm-encoder-fp8-scale-save-margin=
        --mm-tensor-ipc= --mm-ipc-gpu-memory-gb= --mm-device-do-normalize --enable-mm-embeds --interleave-mm-strings
        --skip-mm-profiling --video-pruning-rate= --video-pruning-method= --enable-flash-late-interaction
        """,
    ),
    *ignored(
        "KV cache and state-space caches",
        """
        --block-size= --kv-cache-memory-bytes= --kv-cache-dtype= --kv-cache-dtype-skip-layers=+
        --num-gpu-blocks-override= --enable-prefix-caching --prefix-caching-hash-algo=
        --prefix-cache-retention-interval= --prefix-match-unit= --kv-sharing-fast-prefill --swa-bounded-replay
        --kv-offloading-size= --kv-offloading-backend= --kv-transfer-config= --kv-events-config= --ec-manager-config=
        --disable-hybrid-kv-cache-manager --disable-sliding-window --disable-cascade-attn --gdn-prefill-backend=
        --kda-prefill-backend= --kda-decode-backend= --mamba-backend= --mamba-ssu-algorithm= --mamba-cache-dtype=
        --mamba-ssm-cache-dtype= --mamba-block-size= --mamba-cache-mode= --mamba-cache-philox-rounds=
        --enable-mamba-cache-stochastic-rounding --enable-mamba-shared-prefix-checkpoint --replayssm-buffer-len=
        --use-replayssm --sparse-indexer-topk-backend=
        """,
    ),
    *ignored(
        "prefill and decode: how tokens of a text are scheduled",
        """
        --long-prefill-token-threshold= --long-prefill-token-threshold-adaptive --enable-chunked-prefill
        --disable-chunked-mm-input --scheduler-reserve-full-isl --watermark= --prefill-schedule-interval=
        --async-scheduling
        """,
    ),
    *ignored(
        "kernels, compilation and loading: the same pictures at another speed; ours are chosen by measurement, or with "
        "`--kernels`, `--attention-backend` and `--enforce-eager`",
        """
        --compilation-config/-cc= --optimization-level= -O= --cudagraph-capture-sizes=+ --max-cudagraph-capture-size=
        --performance-mode= --ir-op-priority= --kernel-config= --linear-backend= --moe-backend=
        --enable-flashinfer-autotune --disable-custom-all-reduce --allow-deprecated-quantization
        --safetensors-load-strategy= --safetensors-prefetch-num-threads= --safetensors-prefetch-block-size=
        --model-loader-extra-config= --use-tqdm-on-load --max-parallel-loading-workers= --pt-load-map-location=
        --ignore-patterns=+ --additional-config= --numa-bind --numa-bind-nodes=+ --numa-bind-cpus=+
        --enable-cumem-allocator --enable-nccl-comm-suspend --sleep-mode-offload-cudagraph
        --sleep-preserve-parameter-names=+ --enable-shm-tensor-arena
        """,
    ),
    *ignored(
        "mixture of experts, and ranks that split the context of a text",
        """
        --enable-expert-parallel/-ep --enable-ep-weight-filter --all2all-backend= --enable-eplb --eplb-config=
        --expert-placement-strategy= --elastic-ep-max-dp-size= --enable-dbo --ubatch-size= --dbo-decode-token-threshold=
        --dbo-prefill-token-threshold= --dp-sync-interval= --disable-nccl-for-dp-synchronization
        --enable-batch-sharded-sampling --enable-hc-sp --dcp-comm-backend= --dcp-q-replicate
        --dcp-kv-cache-interleave-size= --cp-kv-cache-interleave-size=
        """,
    ),
    *ignored(
        "processes: workers find each other, and dead ones are always restarted (`--max-worker-restarts`)",
        """
        --master-addr= --master-port= --data-parallel-rpc-port/-dpp= --data-parallel-supervisor-port=
        --dp-supervisor-probe-interval-s= --dp-supervisor-probe-timeout-s= --dp-supervisor-probe-failure-threshold=
        --distributed-timeout-seconds= --cpu-distributed-timeout-seconds= --enable-fault-tolerance
        --ray-workers-use-nsight --fail-on-environ-validation
        """,
    ),
    *ignored(
        "LoRA adapters: those of `--lora-modules` and `--lora-dir` are served without it, of every rank up to 1024",
        """
        --enable-lora --max-lora-rank= --lora-dtype= --fully-sharded-loras
        --enable-tower-connector-lora --specialize-active-lora --enable-mixed-moe-lora-format --enable-moe-shared-loras
        --max-lora-cls-labels=
        """,
    ),
    *ignored(
        "log lines, metrics and answers: `/metrics`, `timings` and `usage` are always given; prompts are logged only "
        "with `--log-prompts`, pictures never",
        """
        --disable-log-stats --aggregate-engine-logging --max-log-len= --enable-log-outputs --enable-log-deltas
        --log-error-stack --enable-per-request-metrics --enable-prompt-tokens-details --enable-force-include-usage
        --enable-server-load-tracking --enable-offline-docs --show-hidden-metrics-for-version=
        --collect-detailed-traces=+ --per-request-spec-decode-metrics= --kv-cache-metrics --kv-cache-metrics-sample=
        --custom-histogram-buckets= --cudagraph-metrics --enable-layerwise-nvtx-tracing --enable-mfu-metrics
        --enable-logging-iteration-details --jit-monitor-mode= --jit-monitor-verbose
        """,
    ),
    *renamed("--max-batch-tokens", "--max-num-batched-tokens= --max-num-scheduled-tokens="),
    *renamed("--max-num-seqs", "--max-num-active-seqs="),
    *renamed("--max-queue-seconds", "--max-num-queued-tokens="),
    *renamed("--attention-backend", "--attention-config/-ac="),
    *renamed("--quantization fp8", "--quantization-config="),
    *renamed("--uvicorn-log-level", "--log-level=", "INFO", "info"),
    *renamed("--max-worker-restarts", "--fault-tolerance-config="),
    *renamed(
        "--enable-cpu-offload or --enable-layerwise-offload",
        "--cpu-offload-gb= --offload-group-size=",
        "0",
    ),
    *renamed(
        "--enable-cpu-offload or --enable-layerwise-offload",
        "--offload-backend= --cpu-offload-params=+ --offload-params=+ --offload-num-in-group= --offload-prefetch-step=",
        "auto",
    ),
    *refused(
        "a model's layers are shared with --tensor-parallel-size, its sequence with --usp and --ring; this takes 1",
        "--pipeline-parallel-size/-pp= --decode-context-parallel-size/-dcp= --prefill-context-parallel-size/-pcp=",
        "1",
    ),
    *refused("a server and its workers run on one host", "--nnodes/-n=", "1"),
    *refused("a server and its workers run on one host", "--node-rank/-r=", "0"),
    *refused("a server and its workers run on one host", "--headless"),
    *refused(
        "all copies of the model run on this host, behind one address: --data-parallel-size",
        """
        --data-parallel-rank/-dpn= --data-parallel-start-rank/-dpr= --data-parallel-size-local/-dpl=
        --data-parallel-address/-dpa= --data-parallel-hybrid-lb/-dph --data-parallel-external-lb/-dpe
        --data-parallel-multi-port-external-lb/-dpm
        """,
    ),
    *refused("copies of the model run in processes of this host; this takes mp", "--data-parallel-backend/-dpb=", "mp"),
    *refused("the number of copies is fixed at start: --data-parallel-size", "--enable-elastic-ep"),
    *refused("one process serves HTTP; this takes 1", "--api-server-count/-asc=", "1"),
    *refused("this server speaks HTTP only", "--grpc --grpc-port="),
    *refused("no routes for tokens in place of text", "--tokens-only --enable-scale-out"),
    *refused("choose GPUs with the variable CUDA_VISIBLE_DEVICES", "--device-ids="),
    *renamed("--gpu-memory-utilization", "--device-memory-utilization="),
    *refused("weights cannot be exchanged while the server runs", "--weight-transfer-config="),
    *refused("no profiler is started by requests", "--profiler-config="),
    *refused("a model is loaded as its folder says", "--hf-config-path="),
    *refused("a model is loaded as its folder says", "--hf-overrides= --model-class-overrides=", "{}"),
    *refused("a model is loaded as its folder says", "--config-format=", "auto", "hf"),
    *refused("workers and scheduler cannot be replaced", "--worker-cls=", "auto"),
    *refused("workers and scheduler cannot be replaced", "--worker-extension-cls= --scheduler-cls="),
    *refused("a request brings at most as many pictures as the model takes", "--limit-mm-per-prompt=", "{}"),
    *refused("an adapter is applied to all layers that it has weights for", "--lora-target-modules=+"),
    *refused(
        "adapters are chosen by request, or for all that name none with --default-sampling-params",
        "--default-mm-loras=",
    ),
    *refused("no watermark is put into pictures", "--watermark-config="),
    *refused(
        "it is for language models that denoise text; ours is --default-sampling-params", "--diffusion-config/-dc="
    ),
    *refused("the text encoder runs beside the transformer, on no server of its own", "--ec-transfer-config="),
    *refused("logs go to stdout and stderr in one format", "--logging-config= --log-config-file="),
    *refused(
        "the limits of HTTP headers are uvicorn's own", "--h11-max-incomplete-event-size= --h11-max-header-count="
    ),
)
