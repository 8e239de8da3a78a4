"""Backbones of keras_hub that are made of other models, in their smallest sizes."""

import importlib

import keras

_SMALL = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "intermediate_dim": 24}
_IMAGE = {"patch_size": 4, **_SMALL, "image_shape": (8, 8, 3)}
_TOKENS = {"vocabulary_size": 50, "embedding_dim": 16, **_SMALL}
_BLIP2 = {**_SMALL, "layer_norm_epsilon": 1e-6}
_SAM3 = {**_SMALL, "image_shape": (28, 28, 3), "patch_size": 14}


def _part(path, **arguments):
    """An instance of a class of keras_hub, many of which it does not export."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"keras_hub.src.models.{module}"), name)(**arguments)


def _resnet(blocks=4):
    return _part(
        "resnet.resnet_backbone.ResNetBackbone",
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64] * blocks,
        stackwise_num_blocks=[1] * blocks,
        stackwise_num_strides=[1, *[2] * (blocks - 1)],
        block_type="basic_block",
    )


def _vision_and_text(package, prefix):
    return {
        "vision_encoder": _part(f"{package}_vision_encoder.{prefix}VisionEncoder", **_IMAGE),
        "text_encoder": _part(
            f"{package}_text_encoder.{prefix}TextEncoder", **_TOKENS, max_sequence_length=6
        ),
    }


def _blip2():
    vision = {"use_patch_bias": True, "use_class_token": True, "use_mha_bias": True}
    return {
        "vision_encoder": _part(
            "blip2.blip2_vision_encoder.BLIP2VisionEncoder",
            **(_BLIP2 | vision | {"image_size": 8, "patch_size": 4, "dropout_rate": 0.0}),
            use_mlp_bias=True,
            initializer_range=0.02,
        ),
        "qformer": _part(
            "blip2.blip2_qformer.BLIP2QFormer",
            **_BLIP2,
            num_query_tokens=2,
            vision_dim=16,
            cross_attention_frequency=1,
            dropout=0.0,
        ),
        "language_model": _part(
            "blip2.blip2_custom_opt.BLIP2CustomOPT",
            **_SMALL,
            vocabulary_size=50,
            num_query_tokens=2,
            qformer_hidden_dim=16,
            max_sequence_length=16,
            dropout=0.0,
            language_projection=None,
        ),
    }


def _d_fine():
    return {
        "backbone": _part(
            "hgnetv2.hgnetv2_backbone.HGNetV2Backbone",
            depths=[1, 1],
            embedding_size=8,
            hidden_sizes=[16, 32],
            stem_channels=[3, 8, 8],
            hidden_act="relu",
            use_learnable_affine_block=True,
            stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
            apply_downsample=[False, True],
            use_lightweight_conv_block=[False, False],
            out_features=["stage1", "stage2"],
        ),
        "decoder_in_channels": [16, 16],
        "encoder_hidden_dim": 16,
        "num_labels": 4,
        "num_denoising": 10,
        "learn_initial_query": False,
        "num_queries": 4,
        "anchor_image_size": (32, 32),
        "feat_strides": [4, 8],
        "num_feature_levels": 2,
        "hidden_dim": 16,
        "encoder_in_channels": [16, 32],
        "encode_proj_layers": [1],
        "num_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "num_encoder_layers": 1,
        "hidden_expansion": 0.5,
        "depth_multiplier": 0.5,
        "eval_idx": -1,
        "num_decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 24,
        "decoder_n_points": [2, 2],
        "lqe_hidden_dim": 16,
        "num_lqe_layers": 2,
        "out_features": ["stage1", "stage2"],
        "image_shape": (32, 32, 3),
    }


def _pyramid():
    image = keras.Input((8, 8, 3))
    return {"inputs": image, "outputs": keras.layers.Conv2D(4, 3)(image)}


def _sam():
    return {
        "image_encoder": _part(
            "vit_det.vit_det_backbone.ViTDetBackbone",
            hidden_size=16,
            num_layers=2,
            intermediate_dim=24,
            num_heads=2,
            global_attention_layer_indices=[1],
            image_shape=(16, 16, 3),
            patch_size=4,
            num_output_channels=8,
            window_size=2,
        ),
        "prompt_encoder": _part(
            "sam.sam_prompt_encoder.SAMPromptEncoder",
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(16, 16),
            mask_in_channels=16,
        ),
        "mask_decoder": _part(
            "sam.sam_mask_decoder.SAMMaskDecoder",
            num_layers=1,
            hidden_size=8,
            intermediate_dim=24,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    }


def _sam3():
    no_image = {name: _SAM3[name] for name in _SMALL}
    return {
        "vision_encoder": _part(
            "sam3.sam3_vision_encoder.SAM3VisionEncoder",
            **_SAM3,
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(28, 28, 3),
            window_size=2,
            global_attn_indexes=[1],
        ),
        "text_encoder": _part("sam3.sam3_text_encoder.SAM3TextEncoder", **_TOKENS),
        "geometry_encoder": _part(
            "sam3.sam3_geometry_encoder.SAM3GeometryEncoder", **no_image, roi_size=7
        ),
        "detr_encoder": _part("sam3.sam3_detr_encoder.SAM3DetrEncoder", **no_image),
        "detr_decoder": _part("sam3.sam3_detr_decoder.SAM3DetrDecoder", **_SAM3, num_queries=4),
        "mask_decoder": _part(
            "sam3.sam3_mask_decoder.SAM3MaskDecoder",
            num_upsampling_stages=3,
            hidden_dim=16,
            num_heads=2,
        ),
    }


def _stable_diffusion_3():
    clip = "clip.clip_text_encoder.CLIPTextEncoder"
    return {
        "mmdit_patch_size": 1,
        "mmdit_hidden_dim": 16,
        "mmdit_num_layers": 2,
        "mmdit_num_heads": 2,
        "mmdit_position_size": 4,
        "mmdit_qk_norm": "rms_norm",
        "mmdit_dual_attention_indices": (0,),
        "vae": _part(
            "vae.vae_backbone.VAEBackbone",
            encoder_num_filters=[32] * 4,
            encoder_num_blocks=[1] * 4,
            decoder_num_filters=[32] * 4,
            decoder_num_blocks=[1] * 4,
            sampler_method="mode",
            name="vae",
        ),
        "clip_l": _part(clip, **_TOKENS, intermediate_output_index=-2, name="clip_l"),
        "clip_g": _part(clip, **_TOKENS, intermediate_output_index=-2, name="clip_g"),
        "image_shape": (16, 16, 3),
    }


# Name -> function that makes its arguments.
ARGUMENTS = {
    "BASNetBackbone": lambda: {
        "image_encoder": _resnet(),
        "num_classes": 1,
        "image_shape": (32, 32, 3),
        "projection_filters": 64,
    },
    "BLIP2Backbone": _blip2,
    "CLIPBackbone": lambda: {**_vision_and_text("clip.clip", "CLIP"), "projection_dim": 8},
    "DFineBackbone": _d_fine,
    "DeepLabV3Backbone": lambda: {
        "image_encoder": _resnet(blocks=3),
        "spatial_pyramid_pooling_key": "P4",
        "upsampling_size": 4,
        "dilation_rates": [2],
        "low_level_feature_key": "P2",
        "projection_filters": 4,
        "image_shape": (32, 32, 3),
    },
    "DepthAnythingBackbone": lambda: {
        "image_encoder": _part(
            "dinov2.dinov2_backbone.DINOV2Backbone",
            **(_IMAGE | {"image_shape": (16, 16, 3), "position_embedding_shape": (16, 16)}),
        ),
        "reassemble_factors": [2, 1],
        "neck_hidden_dims": [4, 8],
        "fusion_hidden_dim": 8,
        "head_hidden_dim": 4,
        "head_in_index": -1,
        "feature_keys": ["stage1", "stage2"],
    },
    "FeaturePyramidBackbone": _pyramid,
    "MetaCLIP2Backbone": lambda: {
        **_vision_and_text("metaclip_2.metaclip_2", "MetaCLIP2"),
        "projection_dim": 8,
    },
    "PARSeqBackbone": lambda: {
        "image_encoder": _part(
            "vit.vit_backbone.ViTBackbone",
            image_shape=(8, 8, 3),
            patch_size=(4, 4),
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=24,
            use_class_token=False,
        ),
        "vocabulary_size": 50,
        "max_label_length": 6,
        "decoder_hidden_dim": 16,
        "num_decoder_layers": 1,
        "num_decoder_heads": 2,
        "decoder_mlp_dim": 24,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
    },
    "RetinaNetBackbone": lambda: {
        "image_encoder": _resnet(),
        "min_level": 3,
        "max_level": 5,
        "use_p5": True,
        "image_shape": (64, 64, 3),
    },
    "SAM3PromptableConceptBackbone": _sam3,
    "SAMBackbone": _sam,
    "SegFormerBackbone": lambda: {
        "image_encoder": _part(
            "mit.mit_backbone.MiTBackbone",
            layerwise_depths=[1, 1],
            num_layers=2,
            layerwise_num_heads=[1, 2],
            layerwise_sr_ratios=[2, 1],
            max_drop_path_rate=0.0,
            layerwise_patch_sizes=[3, 3],
            layerwise_strides=[2, 2],
            hidden_dims=[8, 16],
            image_shape=(16, 16, 3),
        ),
        "projection_filters": 8,
    },
    "SigLIPBackbone": lambda: _vision_and_text("siglip.siglip", "SigLIP"),
    "StableDiffusion3Backbone": _stable_diffusion_3,
}
