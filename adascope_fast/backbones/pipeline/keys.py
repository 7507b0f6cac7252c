"""Every key of a pipeline's configuration that could change an image: used, irrelevant, or refused by name.

`pipe(prompt)` of diffusers is what each is measured by. One table holds the verdicts; backbones consult it when they
are made, and docs/pipeline_settings.md is written from it. A key that is not in the table is refused where the
installed class reads it and it is not at its default, and told where no class reads it.
"""

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

FAMILIES = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
UNETS, FLOWS = FAMILIES[:2], FAMILIES[2:]
MODULE = "diffusers' own module, which is called as it is"
LARGEST = {"layers": 2**10, "heads": 2**12, "blocks": 2**10, "sample_size": 2**14, "pos_embed_max_size": 2**13}
LARGEST_NUMBER = 2**24


@dataclass(frozen=True)
class Row:
    """Keys of a component and their verdict.

    Args:
        component: class of the component.
        keys: their names.
        verdict: "used", "irrelevant", or "refused" unless the value is one of `only`.
        why: where it is used, or the reason.
        families: backbones that the row holds for.
    """

    component: str
    keys: tuple[str, ...]
    verdict: Literal["used", "irrelevant", "refused"]
    why: str
    only: tuple[Any, ...] = ()
    families: tuple[str, ...] = FAMILIES


def _used(component: str, keys: str, why: str = MODULE, families: tuple[str, ...] = FAMILIES) -> Row:
    return Row(component, tuple(keys.split()), "used", why, families=families)


def _irrelevant(component: str, keys: str, why: str, families: tuple[str, ...] = FAMILIES) -> Row:
    return Row(component, tuple(keys.split()), "irrelevant", why, families=families)


def _refused(component: str, keys: str, only: tuple[Any, ...], why: str, families: tuple[str, ...] = FAMILIES) -> Row:
    return Row(component, tuple(keys.split()), "refused", why, only, families)


PIPELINE, BETAS, TOKENIZER = "pipeline", "scheduler with betas", "tokenizer"
ROLLOUTS = "a rollout is DDIM or DDPM of the same noise levels"

TABLE: tuple[Row, ...] = (
    _irrelevant(PIPELINE, "requires_safety_checker", "a reward scores every image; the checker is never run"),
    _used(PIPELINE, "force_zeros_for_empty_prompt", "of the empty prompt", ("StableDiffusionXL",)),
    _irrelevant(
        PIPELINE, "add_watermarker", "it marks finished images invisibly, after the reward", ("StableDiffusionXL",)
    ),
    _used(
        "UNet2DConditionModel",
        "block_out_channels down_block_types mid_block_type up_block_types layers_per_block downsample_padding "
        "mid_block_scale_factor act_fn norm_num_groups norm_eps transformer_layers_per_block "
        "reverse_transformer_layers_per_block attention_head_dim num_attention_heads only_cross_attention "
        "dual_cross_attention use_linear_projection upcast_attention resnet_time_scale_shift resnet_skip_time_act "
        "resnet_out_scale_factor time_embedding_type time_embedding_dim time_embedding_act_fn timestep_post_act "
        "conv_in_kernel conv_out_kernel attention_type class_embeddings_concat mid_block_only_cross_attention "
        "cross_attention_norm addition_embed_type_num_heads center_input_sample flip_sin_to_cos freq_shift "
        "addition_time_embed_dim projection_class_embeddings_input_dim",
    ),
    _used("UNet2DConditionModel", "in_channels", "latents of as many channels, which the VAE must have too"),
    _used("UNet2DConditionModel", "out_channels", "as many as input channels, else refused"),
    _used("UNet2DConditionModel", "cross_attention_dim", "must be the width of the text encoders"),
    _used("UNet2DConditionModel", "sample_size", "size of the images where model.resolution is absent"),
    _irrelevant("UNet2DConditionModel", "dropout", "it stays off, also where activations are recomputed"),
    _refused(
        "UNet2DConditionModel", "time_cond_proj_dim", (None,), "distilled for guidance: too few steps for RL"
    ),
    _refused(
        "UNet2DConditionModel", "class_embed_type num_class_embeds", (None,), "it asks for a class beside the prompt"
    ),
    _refused(
        "UNet2DConditionModel", "encoder_hid_dim encoder_hid_dim_type", (None,), "it asks for other than the text"
    ),
    _refused(
        "UNet2DConditionModel", "addition_embed_type", (None,), "Stable Diffusion tells it nothing but the text",
        ("StableDiffusion",),
    ),
    _refused(
        "UNet2DConditionModel", "addition_embed_type", ("text_time",), "SDXL tells it the pooled text and the size",
        ("StableDiffusionXL",),
    ),
    _used(
        "SD3Transformer2DModel",
        "num_layers attention_head_dim num_attention_heads caption_projection_dim dual_attention_layers qk_norm",
    ),
    _used("SD3Transformer2DModel", "in_channels", "latents of as many channels, which the VAE must have too"),
    _used("SD3Transformer2DModel", "out_channels", "as many as input channels, else refused"),
    _used("SD3Transformer2DModel", "joint_attention_dim pooled_projection_dim", "must fit the text encoders"),
    _used("SD3Transformer2DModel", "patch_size", "sides of the latent are multiples of it"),
    _used("SD3Transformer2DModel", "pos_embed_max_size", "the largest image"),
    _used("SD3Transformer2DModel", "sample_size", "size of the images where model.resolution is absent"),
    _used(
        "FluxTransformer2DModel", "num_layers num_single_layers attention_head_dim num_attention_heads axes_dims_rope"
    ),
    _used("FluxTransformer2DModel", "in_channels", "a quarter of it is the latents' channels, as the VAE has"),
    _used("FluxTransformer2DModel", "out_channels", "none or as many as input channels, else refused"),
    _used("FluxTransformer2DModel", "joint_attention_dim pooled_projection_dim", "must fit the text encoders"),
    _refused("FluxTransformer2DModel", "patch_size", (1,), "FluxPipeline packs patches of 2 x 2 latents itself"),
    _used("FluxTransformer2DModel", "guidance_embeds", "FLUX.1-schnell, which has none, is refused"),
    _used(
        "AutoencoderKL",
        "in_channels out_channels down_block_types up_block_types layers_per_block act_fn norm_num_groups "
        "use_quant_conv use_post_quant_conv mid_block_add_attention",
    ),
    _used("AutoencoderKL", "block_out_channels", "diffusers' own module; their number is the scale of the latents"),
    _used("AutoencoderKL", "latent_channels", "must be the denoiser's"),
    _used("AutoencoderKL", "scaling_factor", "latents are divided by it before they are decoded"),
    _used("AutoencoderKL", "shift_factor", "added before latents are decoded", FLOWS),
    _irrelevant("AutoencoderKL", "shift_factor", "diffusers' pipeline of this family does not read it", UNETS),
    _used(
        "AutoencoderKL", "latents_mean latents_std", "latents are moved and scaled by both", ("StableDiffusionXL",)
    ),
    _irrelevant(
        "AutoencoderKL", "latents_mean latents_std", "diffusers' pipeline of this family does not read them",
        ("StableDiffusion", "StableDiffusion3", "Flux"),
    ),
    _used("AutoencoderKL", "force_upcast", "float16 weights are decoded with in float32, in every family"),
    _used("AutoencoderKL", "sample_size", "tiles of `pipe.vae.enable_tiling()`, which stays on if it is"),
    _used(
        "AutoencoderTiny",
        "in_channels out_channels encoder_block_out_channels decoder_block_out_channels act_fn upsample_fn "
        "upsampling_scaling_factor num_encoder_blocks num_decoder_blocks latent_magnitude latent_shift",
    ),
    _used("AutoencoderTiny", "block_out_channels", "their number is the scale of the latents"),
    _used("AutoencoderTiny", "latent_channels", "must be the denoiser's"),
    _used("AutoencoderTiny", "scaling_factor", "latents are divided by it before they are decoded"),
    _used("AutoencoderTiny", "shift_factor", "added before latents are decoded", FLOWS),
    _irrelevant("AutoencoderTiny", "shift_factor", "diffusers' pipeline of this family does not read it", UNETS),
    _used("AutoencoderTiny", "force_upcast", "float16 weights are decoded with in float32"),
    _used(BETAS, "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr",
          "the noise levels"),
    _refused(
        BETAS, "prediction_type", ("epsilon", "v_prediction", "sample"), "the denoiser's output is one of these"
    ),
    _refused(
        BETAS, "timestep_spacing", ("leading", "trailing", "linspace"), "timesteps are spaced in one of these ways"
    ),
    _used(BETAS, "steps_offset", "the timesteps; see `Schedule.from_diffusers`"),
    _used(BETAS, "set_alpha_to_one", "the last step without noise; with noise it ends at alphas_cumprod[0]"),
    _used(BETAS, "variance_type", "the noise of sampler.kind = \"ddpm\""),
    _refused(BETAS, "clip_sample thresholding", (False, None), "steps must be affine in the output"),
    _irrelevant(BETAS, "clip_sample_range dynamic_thresholding_ratio sample_max_value",
                "nothing is clipped or thresholded"),
    _refused(BETAS, "use_flow_sigmas", (False, None), "the noise levels are not those of a flow here"),
    _refused(BETAS, "use_dynamic_shifting", (False, None), "only flows shift their noise levels"),
    _refused(BETAS, "timestep_type", ("discrete", None), "the denoiser is told discrete timesteps"),
    _used(BETAS, "use_karras_sigmas use_exponential_sigmas use_beta_sigmas interpolation_type sigma_min sigma_max "
          "final_sigmas_type", f"where Euler draws without noise; {ROLLOUTS}"),
    _irrelevant(BETAS, "solver_order solver_type solver_p algorithm_type lower_order_final euler_at_final "
                "use_lu_lambdas lambda_min_clipped skip_prk_steps predict_x0 disable_corrector flow_shift "
                "time_shift_type shift_terminal", f"of multi-step solvers; {ROLLOUTS}"),
    _used("FlowMatchEulerDiscreteScheduler", "num_train_timesteps shift use_dynamic_shifting base_shift max_shift "
          "base_image_seq_len max_image_seq_len shift_terminal use_karras_sigmas use_exponential_sigmas "
          "use_beta_sigmas time_shift_type", "the sigmas, by the scheduler itself"),
    _refused("FlowMatchEulerDiscreteScheduler", "invert_sigmas", (False, None), "sigmas must fall"),
    _refused("FlowMatchEulerDiscreteScheduler", "stochastic_sampling", (False, None),
             "the noise of a rollout is sampler.kind's"),
    _irrelevant("FlowMatchEulerDiscreteScheduler", "prediction_type flow_shift use_flow_sigmas",
                "another scheduler's, which this class does not read"),
    _used("CLIPTextModel", "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
          "max_position_embeddings hidden_act layer_norm_eps projection_dim pad_token_id bos_token_id eos_token_id",
          "transformers' own module"),
    _used("CLIPTextModel", "use_attention_mask", "Stable Diffusion masks the padding", ("StableDiffusion",)),
    _used("T5EncoderModel", "vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets "
          "relative_attention_max_distance layer_norm_epsilon feed_forward_proj dense_act_fn is_gated_act "
          "tie_word_embeddings pad_token_id eos_token_id", "transformers' own module"),
    _irrelevant("T5EncoderModel", "num_decoder_layers is_encoder_decoder use_cache decoder_start_token_id "
                "scale_decoder_outputs classifier_dropout", "of T5's decoder, which is not there"),
    _refused("T5EncoderModel", "is_decoder", (False,), "a T5 encoder reads a prompt as a whole"),
    *(
        row
        for name in ("CLIPTextModel", "T5EncoderModel")
        for row in (
            _irrelevant(name, "attention_dropout dropout_rate", "encoders never train"),
            _irrelevant(name, "initializer_range initializer_factor", "all weights are read"),
            _refused(name, "return_dict", (True,), "pipelines read the encoder's outputs by name"),
            _irrelevant(name, "output_hidden_states output_attentions", "pipelines ask for what they read"),
            _irrelevant(name, "chunk_size_feed_forward id2label label2id problem_type architectures model_type dtype "
                        "torch_dtype transformers_version", "no effect on the encoding; model.dtype is its type"),
        )
    ),
    _used(TOKENIZER, "model_max_length truncation_side padding_side special_tokens added_tokens",
          "transformers' own tokenizer; the CLIP ones must not read more than the encoder has positions"),
)  # fmt: skip


def refuse_settings(family: str, part: str, component: Any) -> None:
    """ValueError for a setting of a pipeline's component that the backbone cannot honour.

    Args:
        family: name of the backbone's class.
        part: the component's name in the pipeline.
        component: a model or scheduler, with its `config`.
    """
    names = [base.__name__ for base in type(component).__mro__]
    for key, value in settings_of(component).items():
        row = find(family, part, names, key)
        if row is None:
            _refuse_unknown(part, component, key, value)
        elif row.verdict == "refused" and not any(value is one or value == one for one in row.only):
            accepted = " or ".join(_short(one) for one in row.only if one is not None or len(row.only) == 1)
            raise ValueError(
                f"{key} of the {part} must be {accepted}, got {_short(value)}: {row.why}; use a model without it"
            )


def refuse_pipeline_settings(family: str, settings: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Tell of keys of `model_index.json` that neither name a component nor are known."""
    for key, value in settings.items():
        if not key.startswith("_") and key not in parts and find(family, PIPELINE, [PIPELINE], key) is None:
            warnings.warn(
                f"{key} = {_short(value)} in model_index.json is no setting that a {family} reads", RuntimeWarning,
                stacklevel=2,
            )  # fmt: skip


def find(family: str, part: str, classes: Iterable[str], key: str) -> Row | None:
    """The row of a key; None where there is none. `classes` are those of the component and its bases."""
    classes = set(classes) | ({"CLIPTextModel"} if "CLIPTextModelWithProjection" in classes else set())
    if part == "scheduler" and "FlowMatchEulerDiscreteScheduler" not in classes:
        classes.add(BETAS)
    for row in TABLE:
        if row.component in classes and key in row.keys and family in row.families:
            return row
    return None


def settings_of(component: Any) -> dict[str, Any]:
    """The settings of a model or scheduler, without private ones."""
    config = component.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _refuse_unknown(part: str, component: Any, key: str, value: Any) -> None:
    if key == "quantization_config":
        return  # of a quantised model, which diffusers has read
    is_transformers = hasattr(component.config, "to_dict")
    defaults = type(component.config)().to_dict() if is_transformers else defaults_of(type(component))
    if key in defaults:
        if _plain(value) != _plain(defaults[key]):
            raise ValueError(
                f"{key} of the {part} must be {_short(defaults[key])}, its default, got {_short(value)}: this version "
                f"of adascope-fast does not know what it changes; use a model without it, or a newer version"
            )
    elif not is_transformers and part != "scheduler":  # schedulers' configs keep each other's keys
        warnings.warn(
            f"{key} = {_short(value)} of the {part} is no setting that diffusers' {type(component).__name__} reads; "
            f"upgrade diffusers if the model needs it",
            RuntimeWarning,
            stacklevel=2,
        )


def defaults_of(component_class: type) -> dict[str, Any]:
    """Settings of a class of diffusers and their defaults."""
    parameters = inspect.signature(getattr(component_class, "__init__")).parameters.values()  # noqa: B009
    return {
        one.name: one.default
        for one in parameters
        if one.name != "self" and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    }


def refuse_absurd(defaults: Mapping[str, Any], config: Mapping[str, Any], file: str) -> None:
    """ValueError for a value of the wrong kind, or of a size that no model has.

    Args:
        defaults: of the class's settings, which say what kind a value is.
        config: as the JSON file has it.
        file: what an error calls it.
    """
    for key, value in config.items():
        if not key.startswith("_") and key in defaults and (wrong := _absurd(key, value, defaults[key])):
            raise ValueError(f"{key} in {file} must be {wrong}, got {_short(value)}; correct it, or download it again")


def _absurd(key: str, value: Any, default: Any) -> str:
    """What `value` must be, where it is not; empty where it can be."""
    limit = next((size for word, size in LARGEST.items() if word in key), LARGEST_NUMBER)
    leaves = list(_leaves(value))
    numbers: list[Any] = [leaf for leaf in leaves if isinstance(leaf, Real) and not isinstance(leaf, bool)]
    if key == "lambda_min_clipped":
        return ""
    if any(not math.isfinite(number) or abs(number) > limit for number in numbers):
        return f"at most {limit}"
    if len(leaves) > limit or len(leaves) > 2**12:
        return f"a list of at most {min(limit, 2**12)}"
    if value is None or default is inspect.Parameter.empty:
        return ""
    first = next(_leaves(default), None)
    if isinstance(first, bool):
        return "" if all(isinstance(leaf, bool) for leaf in leaves) else "true or false"
    if isinstance(first, Real):
        if isinstance(value, (dict, str)) or len(numbers) != len(leaves):
            return "a number"
        if isinstance(first, int) and not all(float(number).is_integer() for number in numbers):
            return "a whole number"
        return "" if numbers and min(numbers) >= (-1 if "token_id" in key else 0) else "0 or more"
    if isinstance(first, str):
        return "" if all(isinstance(leaf, (str, bool)) for leaf in leaves) and leaves else "text"
    return "" if isinstance(value, (bool, Real, str, list, tuple, dict)) else "a plain value"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    return f"{value!r:.60}"


def markdown() -> str:
    """docs/pipeline_settings.md."""
    lines = [
        "# A pipeline's settings",
        "",
        "Each setting of a pipeline's components is measured by `pipe(prompt)` of diffusers: used, irrelevant, or",
        "refused by name. A setting that is not listed is refused where diffusers' class reads it and it is not at its",
        "default, and told where the class does not know it. The table is written from",
        "`adascope_fast/backbones/pipeline/keys.py`, which the loader consults.",
        "",
        "| component | settings | families | verdict |",
        "|---|---|---|---|",
    ]
    for row in TABLE:
        families = "all" if row.families == FAMILIES else ", ".join(row.families)
        only = " or ".join(f"`{one!r}`" for one in row.only)
        verdict = {"used": "used: ", "irrelevant": "irrelevant: ", "refused": f"refused unless {only}: "}[row.verdict]
        names = ", ".join(f"`{key}`" for key in row.keys)
        lines.append(f"| {row.component} | {names} | {families} | {verdict}{row.why} |")
    return "\n".join([*lines, ""])
