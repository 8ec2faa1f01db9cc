"""Features of each family and the tests that prove them; `tools/matrix.py` writes README's table from this file.

A test is named as pytest names it, without the cases that it is run with; `[word]` behind the name asks for the cases
whose name has that word.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.diffusion.data import STEP_CACHES

COLUMNS = (
    "Qwen-Image",
    "Qwen-Image-Edit, -2509, -2511",
    "Z-Image, Z-Image-Turbo",
    "Wan 2.1, 2.2",
    "whole pipelines",
)


@dataclass(frozen=True)
class Cell:
    text: str
    """Markdown: footnotes and links may stand in it."""
    tests: tuple[str, ...] = ()
    """Tests that prove the text. Only an empty text, or one that begins with "no" or "not yet", needs none."""


@dataclass(frozen=True)
class Feature:
    name: str
    cells: tuple[Cell, ...]
    """A column each."""


def yes(*tests: str, text: str = "yes") -> Cell:
    return Cell(text, tests)


NOT_YET, EMPTY = Cell("not yet"), Cell("")

DIFFUSION = "tests/diffusion"
COMPUTE = f"{DIFFUSION}/compute"
CACHE = f"{COMPUTE}/cache"
ADAPTERS = f"{COMPUTE}/families/test_adapters.py"
FP8 = f"{COMPUTE}/families/test_float8.py"
OFFLOAD = f"{COMPUTE}/families/test_layer_offload.py"
OFFLOAD_LAYOUTS = f"{COMPUTE}/worker/test_offload_layouts.py"
IN_TURNS = f"{COMPUTE}/offload/test_families.py::test_pictures_are_the_same_with_one_component_at_a_time"
SINGLE_FILES = f"{COMPUTE}/families/test_single_files.py"
WEIGHTS = f"{COMPUTE}/weights"
GGUF = f"{COMPUTE}/weights/test_gguf_file.py"
TEXT_8_BITS = f"{COMPUTE}/text/test_compressed_encoders.py"
SHARDING = f"{COMPUTE}/worker/test_weight_sharding.py"
OPENAI = "tests/entrypoints/openai"
FAMILIES = "tests/test_families.py"
SLEEP = f"{COMPUTE}/worker/test_worker_sleep.py"
RESUME = f"{DIFFUSION}/compute/worker/test_resume.py"
COMPILING = f"{COMPUTE}/startup/test_compiling.py"
LAYOUTS = f"{COMPUTE}/worker/test_layouts.py"
EDIT_LAYOUTS = f"{COMPUTE}/worker/test_edit_layouts.py"
QWEN_IMAGE = f"{COMPUTE}/families/qwen_image/test_pictures.py"
QWEN_IMAGE_EDIT = f"{COMPUTE}/families/qwen_image/test_edits.py"
Z_IMAGE = f"{COMPUTE}/families/z_image/test_pictures.py"
WAN = f"{COMPUTE}/families/wan"
WAN_BATCHES = f"{WAN}/test_videos.py::test_a_mixed_batch_draws_what_diffusers_draws"

WHOLE = f"{COMPUTE}/families/diffusers_fallback"
WHOLE_EDITS = f"{WHOLE}/test_edits.py"
WHOLE_VIDEOS = f"{WHOLE}/test_videos.py"
WHOLE_HTTP = f"{OPENAI}/test_whole_pipelines.py"
WHOLE_PICTURES = f"{WHOLE}/test_pictures.py::test_a_picture_is_diffusers_own"
TAKING_TURNS = f"{WHOLE}/test_pictures.py::test_requests_under_way_do_not_touch_one_another"

SINGLE_EDITS = f"{QWEN_IMAGE_EDIT}::test_a_mixed_batch_of_single_pictures"
SEVERAL_EDITS = f"{QWEN_IMAGE_EDIT}::test_a_mixed_batch_of_several_pictures"
MIXED_BATCHES = (
    yes(f"{QWEN_IMAGE}::test_a_mixed_batch_draws_what_diffusers_draws"),
    yes(SINGLE_EDITS, SEVERAL_EDITS),
    yes(f"{Z_IMAGE}::test_a_mixed_batch_draws_what_diffusers_draws"),
)
"""Batches of all sizes, steps and guidance, with sigmas of the request's own, against diffusers."""
DATA_PARALLEL = (
    f"{DIFFUSION}/control/test_replicas.py::test_pictures_of_one_call_spread_and_share_a_queue",
    f"{DIFFUSION}/control/executor/test_worker_groups.py::test_two_replicas_of_two_share_the_work_and_one_dies",
)
"""Blind to families: whole engines side by side."""


def step_caches_feature() -> Feature:
    """Row of all registered step caches: each of them runs the tests that it names."""
    names = ", ".join(f"`{name}`" for name in STEP_CACHES)
    return Feature(
        f"step caches ({names}), also in mixed batches and on several devices",
        (
            yes(
                f"{CACHE}/test_company.py::test_decisions_and_pictures_are_those_of_the_request_alone",
                f"{CACHE}/test_layouts.py::test_a_layout_decides_as_one_process",
            ),
            yes(
                f"{CACHE}/test_families.py::test_decisions_and_pictures_are_those_of_the_request_alone[edits]",
                f"{CACHE}/test_families.py::test_layouts_decide_as_one_process[edits]",
            ),
            yes(
                f"{CACHE}/test_families.py::test_decisions_and_pictures_are_those_of_the_request_alone[z_images]",
                f"{CACHE}/test_families.py::test_layouts_decide_as_one_process[z_images]",
                text="yes (calibrate TeaCache first)",
            ),
            yes(
                f"{CACHE}/test_families.py::test_decisions_and_pictures_are_those_of_the_request_alone[videos]",
                f"{CACHE}/test_families.py::test_layouts_decide_as_one_process[videos]",
                text="yes (calibrate TeaCache first)",
            ),
            Cell("no", (f"{WHOLE}/test_info.py::test_settings_of_packed_steps_are_refused",)),
        ),
    )


FEATURES = (
    Feature(
        "text to image",
        (
            yes(*MIXED_BATCHES[0].tests, f"{QWEN_IMAGE}::test_the_demo_model_draws_what_diffusers_draws"),
            Cell(
                "no: edits",
                (
                    "tests/test_edits_offline.py::test_what_the_model_cannot_take_is_refused_by_name",
                    f"{OPENAI}/routes/test_image_edits.py::test_generations_say_where_to_go",
                ),
            ),
            yes(
                *MIXED_BATCHES[2].tests,
                f"{Z_IMAGE}::test_defaults_draw_what_diffusers_draws_with_its_own",
                "tests/entrypoints/cli/test_z_image.py::test_the_server_draws_what_diffusers_draws",
            ),
            yes(
                WAN_BATCHES,
                f"{OPENAI}/routes/test_pictures_of_video_models.py::test_the_sdk_gets_diffusers_own_pictures",
                text="yes (one frame)",
            ),
            yes(
                WHOLE_PICTURES,
                f"{OPENAI}/test_whole_adapters.py::test_the_sdk_gets_diffusers_own_pictures",
            ),
        ),
    ),
    Feature(
        "one input picture; several",
        (
            Cell("no", (f"{OPENAI}/routes/test_image_errors.py::test_edits_say_where_to_go",)),
            yes(
                SINGLE_EDITS,
                SEVERAL_EDITS,
                f"{QWEN_IMAGE_EDIT}::test_the_first_model_takes_one_picture_the_others_several",
                f"{OPENAI}/routes/test_image_edits.py::test_a_real_model_end_to_end",
                text="yes; yes (not the first one)",
            ),
            Cell("no"),
            yes(WAN_BATCHES, text="yes; first and last frame"),
            yes(
                f"{WHOLE_EDITS}::test_an_edit_is_diffusers_own",
                f"{WHOLE_EDITS}::test_several_pictures_are_seen_in_their_order",
                f"{WHOLE_HTTP}::test_the_sdk_gets_diffusers_own_edit",
                text="yes; yes (Flux 2)",
            ),
        ),
    ),
    Feature(
        "parameters of guidance",
        (
            Cell("`true_cfg_scale`", MIXED_BATCHES[0].tests),
            Cell("`true_cfg_scale`", MIXED_BATCHES[1].tests),
            Cell(
                "`guidance_scale`, `cfg_normalization`, `cfg_truncation`",
                (f"{Z_IMAGE}::test_guidance_is_truncated_and_normalised_as_in_diffusers",),
            ),
            Cell("`guidance_scale`, `guidance_scale_2`", (WAN_BATCHES,)),
            Cell(
                "the pipeline's own",
                (f"{OPENAI}/test_whole_adapters.py::test_a_wrong_parameter_is_a_400_that_names_it",),
            ),
        ),
    ),
    Feature(
        "custom sigmas",
        (
            MIXED_BATCHES[0],
            yes(SEVERAL_EDITS),
            MIXED_BATCHES[2],
            yes(f"{COMPUTE}/step/test_schedule.py::test_shift_and_sigmas_of_a_request"),
            yes(WHOLE_PICTURES, text="where the pipeline has them"),
        ),
    ),
    Feature(
        "mixed sizes, steps and guidance in one batch",
        (
            MIXED_BATCHES[0],
            yes(*MIXED_BATCHES[1].tests, text="yes, and any number of pictures"),
            MIXED_BATCHES[2],
            yes(WAN_BATCHES, text="yes, and any number of frames"),
            Cell("no: requests take turns", (TAKING_TURNS,)),
        ),
    ),
    Feature(
        "same pixels as diffusers (float32, at least 60 dB)",
        (
            yes(
                *MIXED_BATCHES[0].tests,
                f"{QWEN_IMAGE}::test_the_demo_model_draws_what_diffusers_draws",
                f"{COMPUTE}/families/qwen_image/test_transformer.py::test_a_pack_equals_one_forward_a_sequence",
            ),
            yes(*MIXED_BATCHES[1].tests, text="yes ([one difference](docs/decisions/input_pictures.md))"),
            yes(
                *MIXED_BATCHES[2].tests,
                f"{Z_IMAGE}::test_defaults_draw_what_diffusers_draws_with_its_own",
                f"{COMPUTE}/families/z_image/test_transformer.py::test_a_pack_equals_one_forward_a_sequence",
            ),
            yes(WAN_BATCHES, f"{WAN}/test_transformer.py::test_a_pack_equals_one_forward_a_sequence"),
            yes(
                WHOLE_PICTURES,
                TAKING_TURNS,
                f"{WHOLE_EDITS}::test_an_edit_is_diffusers_own",
                f"{WHOLE_VIDEOS}::test_frames_are_diffusers_own",
            ),
        ),
    ),
    Feature(
        "streams with previews, cancelling between steps",
        (
            yes(
                f"{FAMILIES}::test_previews_come_in_time_and_who_leaves_disturbs_nobody[qwen_image]",
                f"{COMPUTE}/worker/test_runner.py::test_previews_come_near_the_picture",
                f"{COMPUTE}/worker/test_runner.py::test_an_aborted_request_is_skipped_and_forgotten",
                f"{OPENAI}/responses/test_streams.py::test_partial_images_then_the_picture",
                f"{OPENAI}/responses/test_disconnects.py::test_stream_client_leaves",
            ),
            yes(
                f"{FAMILIES}::test_previews_come_in_time_and_who_leaves_disturbs_nobody[edits]",
                f"{OPENAI}/routes/test_image_edits.py::test_a_stream_says_image_edit",
                f"{OPENAI}/responses/test_disconnects.py::test_client_of_an_edit_leaves",
            ),
            yes(
                f"{FAMILIES}::test_previews_come_in_time_and_who_leaves_disturbs_nobody[z_image]",
                f"{Z_IMAGE}::test_previews_are_predictions_of_the_picture",
            ),
            yes(f"{FAMILIES}::test_previews_come_in_time_and_who_leaves_disturbs_nobody[wan]"),
            yes(f"{WHOLE}/test_pictures.py::test_an_abort_ends_a_request_at_its_next_step", text="cancel; no previews"),
        ),
    ),
    Feature(
        "VAE slicing and tiling",
        (
            *(
                yes(f"{file}::test_slicing_keeps_the_picture", f"{file}::test_tiles_are_those_of_diffusers")
                for file in (QWEN_IMAGE, QWEN_IMAGE_EDIT, Z_IMAGE)
            ),
            yes(f"{WAN}/test_vae.py::test_pieces_of_several_videos_in_turns_are_the_video_of_one_call", text="tiling"),
            yes(f"{WHOLE}/test_pictures.py::test_slicing_keeps_the_picture_and_tiles_are_those_of_diffusers"),
        ),
    ),
    Feature(
        "worker death: restart and replay",
        (
            yes(
                "tests/entrypoints/cli/test_serve.py::test_a_worker_that_is_killed_or_stopped_is_replaced",
            ),
            yes(f"{FAMILIES}::test_a_replay_draws_the_same_picture[edits]"),
            yes(f"{FAMILIES}::test_a_replay_draws_the_same_picture[z_image]"),
            yes(f"{FAMILIES}::test_a_replay_draws_the_same_picture[wan]"),
            yes(f"{FAMILIES}::test_a_replay_draws_the_same_picture[by_diffusers]"),
        ),
    ),
    Feature(
        "[sleep](docs/memory.md#sleep): the devices are free until the server is woken; same pixels",
        (
            *(
                yes(f"{SLEEP}::test_pictures_are_the_same_after_a_sleep[{family}]")
                for family in ("qwen_image", "edit", "z_image", "wan")
            ),
            yes(f"{SLEEP}::test_whole_pipelines_sleep"),
        ),
    ),
    Feature(
        "checkpoints: a request resumes on any worker and layout; same pixels",
        (
            yes(f"{RESUME}::test_a_resumed_request_gives_the_pixels_of_the_undisturbed_run[qwen_image]"),
            yes(f"{FAMILIES}::test_a_killed_worker_costs_the_steps_since_the_newest_checkpoint[edits]"),
            yes(f"{RESUME}::test_a_resumed_request_gives_the_pixels_of_the_undisturbed_run[z_image]"),
            yes(
                f"{RESUME}::test_a_resumed_request_gives_the_pixels_of_the_undisturbed_run[two experts]",
                f"{RESUME}::test_a_request_resumes_on_another_layout",
            ),
            Cell("no: replayed from the start"),
        ),
    ),
    Feature(
        "Ulysses, ring, CFG, tensor and data parallelism, combined; same pixels",
        (
            yes(
                f"{LAYOUTS}::test_pictures_of_a_layout_equal_those_of_one_process[qwen_image]",
                f"{LAYOUTS}::test_the_placement_may_change_at_every_step[qwen_image]",
                *DATA_PARALLEL,
            ),
            yes(
                f"{EDIT_LAYOUTS}::test_edits_of_a_layout_equal_those_of_one_process",
                f"{EDIT_LAYOUTS}::test_edits_with_changing_placement_and_a_shared_text_encoder",
                *DATA_PARALLEL,
            ),
            yes(
                f"{LAYOUTS}::test_pictures_of_a_layout_equal_those_of_one_process[z_image]",
                f"{LAYOUTS}::test_the_placement_may_change_at_every_step[z_image]",
                f"{COMPUTE}/families/z_image/test_info.py::test_degrees_that_the_model_does_not_allow_are_refused",
                *DATA_PARALLEL,
                text="yes (tensor: 1 or 2)",
            ),
            yes(
                f"{LAYOUTS}::test_pictures_of_a_layout_equal_those_of_one_process[wan]",
                f"{LAYOUTS}::test_the_placement_may_change_at_every_step[wan]",
                *DATA_PARALLEL,
            ),
            yes(f"{WHOLE}/test_info.py::test_only_data_parallelism_is_taken", *DATA_PARALLEL, text="data only"),
        ),
    ),
    Feature(
        "decode and text encoder shared by ranks",
        (
            yes(
                f"{LAYOUTS}::test_ranks_may_share_decodes_and_the_text_encoder[qwen_image]",
                f"{COMPUTE}/families/qwen_image/test_vae.py::test_pictures_of_ranks_are_those_of_one_and_of_diffusers",
            ),
            yes(
                f"{EDIT_LAYOUTS}::test_edits_with_changing_placement_and_a_shared_text_encoder",
                f"{COMPUTE}/families/qwen_image/test_vision.py::test_ranks_that_share_it_give_the_same_states",
            ),
            yes(
                f"{LAYOUTS}::test_ranks_may_share_decodes_and_the_text_encoder[z_image]",
                f"{COMPUTE}/families/z_image/test_vae.py::test_pictures_of_ranks_are_those_of_one_and_of_diffusers",
            ),
            yes(
                f"{LAYOUTS}::test_ranks_may_share_decodes_and_the_text_encoder[wan]",
                f"{WAN}/test_vae.py::test_ranks_share_the_tiles_of_each_piece",
            ),
            Cell("no", (f"{WHOLE}/test_info.py::test_only_data_parallelism_is_taken",)),
        ),
    ),
    step_caches_feature(),
    Feature(
        "video",
        (
            EMPTY,
            EMPTY,
            EMPTY,
            yes(
                WAN_BATCHES,
                f"{OPENAI}/routes/test_video_chats.py::test_a_real_model_makes_the_frames_of_the_videos_route",
                text="yes",
            ),
            yes(
                f"{WHOLE_VIDEOS}::test_frames_are_diffusers_own",
                f"{WHOLE_VIDEOS}::test_a_picture_becomes_a_video",
                f"{OPENAI}/routes/test_pictures_of_video_models.py::test_text_becomes_pictures_of_the_default_size[whole]",
                f"{OPENAI}/routes/test_whole_videos.py::test_a_job_and_a_chat_have_diffusers_own_frames",
                text="yes",
            ),
        ),
    ),
    Feature(
        "LoRA adapters, one or several a request, different ones in a batch",
        (
            *(
                yes(
                    f"{ADAPTERS}::test_a_batch_of_adapters_draws_what_diffusers_draws[{family}]",
                    f"{ADAPTERS}::test_neighbours_do_not_notice[{family}]",
                    f"{OPENAI}/test_packed_adapters.py::test_requests_name_one_or_several",
                    f"{OPENAI}/test_packed_adapters.py::test_an_adapter_brings_its_recipe",
                    f"{OPENAI}/test_packed_adapters.py::test_adapters_are_loaded_and_unloaded",
                )
                for family in ("qwen_image", "edit", "z_image", "wan")
            ),
            yes(
                f"{WHOLE}/test_lora.py::test_pictures_with_adapters_are_diffusers_own_alone_and_together",
                f"{WHOLE}/test_lora.py::test_a_script_brings_names_or_paths",
                f"{WHOLE}/test_lora.py::test_a_request_with_several_adapters_has_their_sum",
                f"{OPENAI}/test_whole_adapters.py::test_a_request_names_an_adapter",
            ),
        ),
    ),
    Feature(
        "blocks in float8 (`--quantization fp8`)",
        (
            yes(
                f"{FP8}::test_qwen_image_rounds_its_blocks_and_nothing_else",
                f"{FP8}::test_ranks_say_what_one_says_as_nearly_as_float8_does[qwen_image]",
                f"{FP8}::test_pictures_are_near_and_come_with_a_cache_as_well",
                f"{FP8}::test_weights_are_rounded_one_by_one_as_they_are_read[qwen_image]",
            ),
            yes(f"{FP8}::test_edits_are_near"),
            yes(
                f"{FP8}::test_z_image_rounds_its_layers_and_refiners_and_nothing_else",
                f"{FP8}::test_ranks_say_what_one_says_as_nearly_as_float8_does[z_image]",
                f"{FP8}::test_weights_are_rounded_one_by_one_as_they_are_read[z_image]",
            ),
            yes(
                f"{WAN}/test_transformer.py::test_float8_rounds_the_layers_of_the_blocks_that_run_at_every_step",
                f"{FP8}::test_ranks_say_what_one_says_as_nearly_as_float8_does",
            ),
            Cell("no", (f"{WHOLE}/test_info.py::test_settings_of_packed_steps_are_refused",)),
        ),
    ),
    Feature(
        "transformer from a single safetensors file, also in float8 ([more](docs/model_files.md))",
        (
            yes(
                f"{SINGLE_FILES}::test_a_picture_equals_that_of_diffusers[qwen_image]",
                f"{SINGLE_FILES}::test_a_float8_file_on_a_cpu_draws_what_its_expanded_weights_draw[qwen_image]",
                f"{WEIGHTS}/test_transformer_file.py::test_float8_values_are_kept_with_their_scales[qwen_image]",
            ),
            yes(f"{SINGLE_FILES}::test_an_edit_equals_that_of_the_folder"),
            yes(
                f"{SINGLE_FILES}::test_a_picture_equals_that_of_diffusers[z_image]",
                f"{SINGLE_FILES}::test_a_float8_file_on_a_cpu_draws_what_its_expanded_weights_draw[z_image]",
                f"{WEIGHTS}/test_transformer_file.py::test_float8_values_are_kept_with_their_scales[z_image]",
            ),
            yes(
                f"{SINGLE_FILES}::test_a_picture_equals_that_of_diffusers[wan]",
                f"{SINGLE_FILES}::test_each_of_two_transformers_may_come_from_a_file",
                f"{SINGLE_FILES}::test_a_float8_file_on_a_cpu_draws_what_its_expanded_weights_draw[wan]",
                f"{WEIGHTS}/test_transformer_file.py::test_float8_values_are_kept_with_their_scales[wan]",
            ),
            Cell("no", (f"{DIFFUSION}/catalog/test_transformer_files.py::test_models_that_take_no_such_file_say_so",)),
        ),
    ),
    Feature(
        "GGUF files, whose weights stay compressed (`--transformer-file`)",
        (
            yes(
                f"{GGUF}::test_velocities_are_those_of_diffusers[qwen_image]",
                f"{GGUF}::test_each_rank_keeps_its_share_of_the_blocks[qwen_image]",
                f"{GGUF}::test_pictures_are_those_of_the_expanded_weights",
            ),
            yes(f"{GGUF}::test_edits_are_those_of_the_expanded_weights"),
            *(
                yes(
                    f"{GGUF}::test_velocities_are_those_of_diffusers[{family}]",
                    f"{GGUF}::test_each_rank_keeps_its_share_of_the_blocks[{family}]",
                )
                for family in ("z_image", "wan")
            ),
            Cell("no", (f"{WHOLE}/test_info.py::test_settings_of_packed_steps_are_refused",)),
        ),
    ),
    Feature(
        "text encoder in 8 bits (`--text-encoder-quantization`)",
        (
            yes(
                f"{TEXT_8_BITS}::test_states_are_near_those_of_the_whole_weights",
                f"{TEXT_8_BITS}::test_two_ranks_share_the_encoder",
            ),
            yes(f"{TEXT_8_BITS}::test_edits_are_near_those_of_the_whole_weights"),
            *(
                yes(
                    f"{TEXT_8_BITS}::test_states_are_near_those_of_the_whole_weights",
                    f"{TEXT_8_BITS}::test_two_ranks_share_the_encoder",
                )
                for _ in ("z_image", "wan")
            ),
            Cell("no", (f"{WHOLE}/test_info.py::test_settings_of_packed_steps_are_refused",)),
        ),
    ),
    Feature(
        "compiled blocks on GPUs",
        (
            Cell(
                "with `--kernels torch` only",
                (f"{COMPILING}::test_serving_qwen_image_compiles_nothing", f"{COMPILING}::test_ranks_compile_the_same"),
            ),
            Cell("with `--kernels torch` only", (f"{COMPILING}::test_serving_edits_compiles_nothing",)),
            yes(f"{COMPILING}::test_serving_z_image_compiles_nothing"),
            Cell("with `--kernels torch` only", (f"{COMPILING}::test_serving_wan_compiles_nothing",)),
            Cell("no"),
        ),
    ),
    Feature(
        "layer-wise offload, with float8, step caches, adapters and parallel layouts; same pixels",
        (
            yes(
                f"{OFFLOAD}::test_every_kind_of_layer_streams_and_pictures_are_the_same[pictures]",
                f"{OFFLOAD}::test_pictures_in_float8_are_the_same[pictures]",
                f"{OFFLOAD_LAYOUTS}::test_every_axis_draws_the_same[qwen_image]",
            ),
            yes(
                f"{OFFLOAD}::test_every_kind_of_layer_streams_and_pictures_are_the_same[edits]",
                f"{OFFLOAD}::test_step_caches_skip_the_same_blocks[edits]",
            ),
            yes(
                f"{OFFLOAD}::test_every_kind_of_layer_streams_and_pictures_are_the_same[z_images]",
                f"{OFFLOAD}::test_pictures_in_float8_are_the_same[z_images]",
                f"{OFFLOAD}::test_step_caches_skip_the_same_blocks[z_images]",
                f"{OFFLOAD_LAYOUTS}::test_every_axis_draws_the_same[z_image]",
            ),
            yes(
                f"{OFFLOAD}::test_every_kind_of_layer_streams_and_pictures_are_the_same[videos]",
                f"{OFFLOAD}::test_pictures_in_float8_are_the_same[videos]",
                f"{OFFLOAD}::test_step_caches_skip_the_same_blocks[videos]",
                f"{OFFLOAD_LAYOUTS}::test_every_axis_draws_the_same[wan]",
            ),
            Cell("diffusers' own", (f"{WHOLE}/test_info.py::test_offload_needs_a_gpu",)),
        ),
    ),
    Feature(
        "blocks sharded over the ranks of Ulysses and ring (`--weight-sharding`); same pixels",
        (
            yes(
                f"{SHARDING}::test_every_layout_draws_the_same_and_ranks_keep_parts[qwen_image]",
                f"{SHARDING}::test_after_an_error_on_one_rank_all_gather_the_same_blocks_again",
            ),
            yes(f"{SHARDING}::test_step_caches_adapters_and_float8_draw_the_same"),
            yes(f"{SHARDING}::test_every_layout_draws_the_same_and_ranks_keep_parts[z_image]"),
            yes(f"{SHARDING}::test_every_layout_draws_the_same_and_ranks_keep_parts[wan]"),
            Cell("no"),
        ),
    ),
    Feature(
        "CPU offload",
        (
            yes(f"{IN_TURNS}[qwen_image]"),
            yes(f"{IN_TURNS}[edit]"),
            yes(f"{IN_TURNS}[z_image]"),
            yes(f"{IN_TURNS}[t2v-a14b]", f"{IN_TURNS}[i2v-2.1]", f"{IN_TURNS}[i2v-5b]"),
            Cell("not yet; diffusers' own works", (f"{WHOLE}/test_info.py::test_offload_needs_a_gpu",)),
        ),
    ),
)
