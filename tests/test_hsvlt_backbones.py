import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    BertConfig,
    BitConfig,
    Blip2Config,
    Blip2Model,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    HGNetV2Config,
    HieraConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MaskFormerSwinConfig,
    PixioConfig,
    PPLCNetV3Config,
    RegNetConfig,
    SamVisionConfig,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SwinConfig,
    TimmBackboneConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    VitPoseBackboneConfig,
    YolosConfig,
)
from transformers.utils import is_timm_available

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification

from .tolerance import assert_close_outputs

VIT = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 24}
VIT |= {"image_size": 32, "patch_size": 8}
DINO = Dinov2Config(**{**VIT, "mlp_ratio": 2})
HIERA = HieraConfig(embed_dim=8, image_size=[64, 64], depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "patch_size": 2}


def make_config(backbone, **fields):
    return HSVLTConfig(
        backbone_config=backbone, **{"num_labels": 5, "label_embedding_dim": 12, "image_size": 32, **fields}
    )


def make_model(backbone, **fields):
    torch.manual_seed(0)
    return HSVLTForImageClassification(make_config(backbone, **fields)).eval()


def random_images(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---- which places


@pytest.mark.parametrize(
    ("layers", "stages"), [(12, [3, 6, 9, 12]), (8, [2, 4, 6, 8]), (24, [6, 12, 18, 24]), (5, [2, 3, 4, 5])]
)
def test_a_plain_vit_is_read_at_four_evenly_spaced_layers(layers, stages):
    config = make_config(Dinov2Config(num_hidden_layers=layers))
    assert config.backbone_config.out_features == [f"stage{stage}" for stage in stages]
    with torch.device("meta"):
        tower = HSVLTForImageClassification(make_config(ViTConfig(**{**VIT, "num_hidden_layers": layers})))
    assert tower.hsvlt.backbone.places == stages


def test_a_pyramid_is_read_at_its_last_four_stages_and_a_list_of_four_where_it_says():
    assert make_config(SwinConfig(**SWIN)).backbone_config.out_features == [f"stage{i}" for i in (1, 2, 3, 4)]
    before = ["stage9", "stage10", "stage11", "stage12"]
    config = make_config(Dinov2Config(out_features=before))
    assert HSVLTConfig.from_dict(config.to_dict()).backbone_config.out_features == before
    with pytest.raises(ValueError, match="3 stages; HSVLT reads four"):
        make_config(Dinov2Config(num_hidden_layers=2))


# ---- vision towers


def tower_states(config, images, norm, prefix):
    """transformers' own model, its hidden states of four layers through its norm, patch by patch."""
    torch.manual_seed(3)
    tower = AutoModel.from_config(config).eval()
    with torch.no_grad():
        states = tower(images, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        states = [getattr(tower, norm)(states[layer])[:, prefix:] for layer in (2, 4, 6, 8)]
    height, width = (side // 8 for side in images.shape[-2:])
    return tower, [state.reshape(2, height, width, 16).permute(0, 3, 1, 2) for state in states]


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
@pytest.mark.parametrize(
    ("config_class", "norm", "prefix"),
    [
        (ViTConfig, "layernorm", 1),
        (DeiTConfig, "layernorm", 2),
        (CLIPVisionConfig, "post_layernorm", 1),
        (SiglipVisionConfig, "post_layernorm", 0),
    ],
)
def test_a_tower_gives_the_patches_of_its_normed_states(config_class, norm, prefix, size, tmp_path):
    tower, expected = tower_states(config_class(**VIT), random_images(*size), norm, prefix)
    tower.save_pretrained(tmp_path)
    model = HSVLTForImageClassification.from_backbone(tmp_path, num_labels=5, label_embedding_dim=12).eval()
    with torch.no_grad():
        maps = model.hsvlt.backbone(random_images(*size))
        model.save_pretrained(tmp_path / "saved")
        again = HSVLTForImageClassification.from_pretrained(tmp_path / "saved")
        assert_close_outputs(again(random_images(*size)).logits, model(random_images(*size)).logits)
    for ours, theirs in zip(maps, expected, strict=True):
        assert_close_outputs(ours, theirs)


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (72, 16)])
def test_naflex_reads_images_of_any_aspect_ratio_as_its_own_processor_cuts_them(size):
    naflex = Siglip2VisionConfig(**{k: v for k, v in VIT.items() if k != "image_size"}, num_patches=16)
    ours = make_model(naflex).hsvlt.backbone
    tower = Siglip2VisionModel(naflex).eval()
    weights = {k.removeprefix("model."): v for k, v in ours.state_dict().items() if k.startswith("model.")}
    weights |= {f"post_layernorm.{k}": v for k, v in ours.norm.state_dict().items()}
    assert not any(name.startswith("head.") for name in weights)
    tower.load_state_dict(tower.state_dict() | weights)
    photograph = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    height, width = size[0] // 8, size[1] // 8
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=height * width + 3, do_resize=False)
    inputs = processor([photograph, photograph[::-1].copy()], return_tensors="pt")
    assert inputs["pixel_attention_mask"].sum(1).tolist() == [height * width] * 2
    images = torch.tensor(np.stack([photograph, photograph[::-1]])).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        states = tower(**inputs, output_hidden_states=True).hidden_states
        normed = [tower.post_layernorm(states[layer])[:, :-3] for layer in (2, 4, 6, 8)]
        expected = [state.mT.reshape(2, 16, height, width) for state in normed]
        for found, theirs in zip(ours(images), expected, strict=True):
            assert_close_outputs(found, theirs)


def test_tokens_behind_the_patches_are_none_of_them():
    config = YolosConfig(**{**VIT, "image_size": [32, 32], "num_detection_tokens": 3})
    ours = make_model(config).hsvlt.backbone
    with torch.no_grad():
        states = ours.model(random_images(), output_hidden_states=True).hidden_states
        expected = ours.norm(states[4])[:, 1:17].mT.reshape(2, 16, 4, 4)
        assert_close_outputs(ours(random_images())[1], expected)


def test_a_tower_whose_tokens_stay_on_their_grid():
    """SAM's: (B, H, W, C), without a norm behind the last layer."""
    sam = SamVisionConfig(**{**VIT, "output_channels": 8, "window_size": 2, "global_attn_indexes": [1]})
    ours = make_model(sam).hsvlt.backbone
    assert ours.places == [2, 4, 6, 8] and ours.channels == [16] * 4
    assert not any("neck" in name for name, _ in ours.named_parameters())
    with torch.no_grad():
        states = ours.model(random_images(), output_hidden_states=True).hidden_states
        for found, place in zip(ours(random_images()), ours.places, strict=True):
            assert_close_outputs(found, states[place].permute(0, 3, 1, 2))


def test_a_hiera_s_maps_show_a_change_where_it_is():
    """transformers' HieraBackbone does not: its maps mix places."""
    ours = make_model(HIERA).hsvlt.backbone
    images = random_images(64, 64)
    changed = images.clone()
    changed[..., :8, -8:] += 1
    with torch.no_grad():
        for before, after in zip(ours(images), ours(changed), strict=True):
            height, width = before.shape[2:]
            assert divmod(int((after - before).abs().sum(1)[0].argmax()), width) <= (height // 4, width)
            assert int((after - before).abs().sum((0, 1, 2)).argmax()) >= width * 3 // 4


TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99, "intermediate_size": 16}


def blip_2():
    text = {"model_type": "opt", **TEXT, "ffn_dim": 16, "word_embed_proj_dim": 16}
    return Blip2Model(
        Blip2Config(vision_config=VIT, qformer_config={**TEXT, "encoder_hidden_size": 16}, text_config=text)
    )


def llava():
    text = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config={"model_type": "clip_vision_model", **VIT}, text_config=text)
    )


@pytest.mark.parametrize("build", [blip_2, llava])
def test_a_tower_within_a_larger_model_is_a_source(build, tmp_path):
    """Also one that AutoModel does not know: BLIP-2's, an EVA."""
    torch.manual_seed(3)
    whole = build().eval()
    whole.save_pretrained(tmp_path)
    model = HSVLTForImageClassification.from_backbone(tmp_path, num_labels=5, label_embedding_dim=12).eval()
    tower = next(part for part in whole.modules() if type(part) is type(model.hsvlt.backbone.model))
    with torch.no_grad():
        states = tower(random_images(), output_hidden_states=True).hidden_states
        expected = tower.post_layernorm(states[6])[:, 1:].mT.reshape(2, 16, 4, 4)
        assert_close_outputs(model.hsvlt.backbone(random_images())[2], expected)


@pytest.mark.parametrize(("config_class", "model_class"), [(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)])
def test_a_model_of_image_and_text_stands_for_its_vision_tower(config_class, model_class, tmp_path):
    torch.manual_seed(3)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    both = model_class(config_class(vision_config=VIT, text_config=text)).eval()
    both.save_pretrained(tmp_path)
    model = HSVLTForImageClassification.from_backbone(tmp_path, num_labels=5, label_embedding_dim=12).eval()
    assert model.config.backbone_config.model_type.endswith("_vision_model")
    with torch.no_grad():
        state = both.vision_model(random_images(), output_hidden_states=True).hidden_states[4]
        expected = both.vision_model.post_layernorm(state)[:, -16:].mT.unflatten(2, (4, 4))
        assert_close_outputs(model.hsvlt.backbone(random_images())[1], expected)


def test_the_vision_tower_of_a_configuration_names_no_kernel():
    both = CLIPConfig(vision_config=VIT)  # written into a file, transformers leaves it out
    both.vision_config._attn_implementation = "org/kernel"
    assert make_config(both).backbone_config._attn_implementation is None
    fields = both.to_dict()
    for key in ("attn_implementation", "_attn_implementation"):
        fields["vision_config"][key] = "org/kernel"
    assert make_config(fields).backbone_config._attn_implementation is None


def test_a_fine_tuned_vit_is_a_source(tmp_path):
    torch.manual_seed(3)
    source = ViTForImageClassification(ViTConfig(**VIT))  # without the pooling layer
    source.save_pretrained(tmp_path)
    model = HSVLTForImageClassification.from_backbone(tmp_path, num_labels=5, label_embedding_dim=12)
    assert torch.equal(model.hsvlt.backbone.norm.weight, source.vit.layernorm.weight)
    assert not any("pool" in name for name, _ in model.named_parameters())


def test_a_convolutional_tower_is_read_at_four_resolutions():
    model = make_model(RegNetConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], embedding_size=8, groups_width=8))
    assert model.hsvlt.backbone.strides == [4, 8, 16, 32]


@pytest.mark.parametrize(
    "backbone", [SwinConfig(**SWIN, image_size=32, return_dict=False), ViTConfig(**VIT, return_dict=False)]
)
def test_a_configuration_that_asks_for_tuples_is_read_all_the_same(backbone):
    assert make_model(backbone)(random_images()).logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [(BertConfig(), "no backbone and no vision model"), (ViTMAEConfig(**VIT), "shuffles patches")],
)
def test_what_gives_no_maps_is_refused(backbone, reason):
    with pytest.raises(ValueError, match=reason):
        make_model(backbone)


# ---- no parameter without a gradient


@pytest.mark.parametrize(
    "backbone",
    [
        DINO,
        Dinov2Config(**{**VIT, "mlp_ratio": 2}, out_features=["stage1", "stage2", "stage3", "stage4"]),
        BitConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], embedding_size=8, num_groups=2),
        PixioConfig(**{**VIT, "mlp_ratio": 2}),
        MaskFormerSwinConfig(**SWIN, image_size=32),
        PPLCNetV3Config(scale=0.125),
        ViTConfig(**VIT),
        SiglipVisionConfig(**VIT),
    ],
    ids=lambda backbone: f"{backbone.model_type}-{(getattr(backbone, 'out_features', None) or [''])[-1]}",
)
def test_a_gradient_reaches_every_parameter_of_a_backbone(backbone):
    model = make_model(backbone).train().requires_grad_(True)
    model(random_images(), labels=torch.ones(2, 5)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_weights_that_nothing_needs_are_not_saved_and_do_not_disturb_where_they_were(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model(DINO)
    assert "mask_token" in dict(model.hsvlt.backbone.model.embeddings.named_buffers())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("mask_token" in name for name in weights)
    weights["hsvlt.backbone.model.embeddings.mask_token"] = torch.zeros(1, 16)  # as checkpoints before 0.2 have it
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = HSVLTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert_close_outputs(again(random_images()).logits, model(random_images()).logits)


def test_looking_without_data_draws_no_random_number():
    torch.manual_seed(0)
    swin = SwinConfig(**SWIN, image_size=32, drop_path_rate=0.5)
    from transformers import AutoBackbone

    AutoBackbone.from_config(make_config(swin).backbone_config)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    from modeling_hsvlt.hsvlt_backbones import build_backbone

    build_backbone(make_config(swin))
    assert torch.equal(torch.get_rng_state(), expected)


# ---- what configurations do not say


def test_channels_are_those_of_the_maps():
    stages = {"stage_in_channels": [8, 8, 8, 8], "stage_mid_channels": [8] * 4, "stage_out_channels": [8, 8, 8, 16]}
    stages |= {"stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4, "stem_channels": [3, 8, 8]}
    model = make_model(HGNetV2Config(embedding_size=8, **stages))  # hidden_sizes: 256 to 2048
    assert model.hsvlt.backbone.channels == [8, 8, 8, 16]
    assert model(random_images()).logits.shape == (2, 5)


@pytest.mark.parametrize(
    "backbone",
    [
        HIERA,
        VitPoseBackboneConfig(**{**VIT, "image_size": [64, 64], "mlp_ratio": 2}),
    ],
    ids=["hiera", "vitpose"],
)
def test_a_backbone_of_one_size_says_so(backbone):
    model = make_model(backbone)
    assert model(random_images(64, 64), output_hidden_states=True).hidden_states[3].ndim == 4
    with pytest.raises(ValueError, match=r"made for 64 x 64 pixels\) cannot read images of 96 x 128 .*set image_size"):
        model(random_images(96, 128))


# ---- the simple pyramid


def vitdet_pyramid(pyramid, x):
    """From the released code of ViTDet (detectron2's SimpleFeaturePyramid), on the weights of ours."""

    def norm(y, layer):
        mean, var = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
        return (y - mean) / (var + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]

    maps = []
    for scale, layers in zip((4, 2, 1, 0.5), pyramid.scales, strict=True):
        layers, y = list(layers), x
        if scale == 4:
            y = F.conv_transpose2d(y, layers[0].weight, layers[0].bias, stride=2)
            y = F.gelu(norm(y, layers[1]))
            y = F.conv_transpose2d(y, layers[3].weight, layers[3].bias, stride=2)
        elif scale == 2:
            y = F.conv_transpose2d(y, layers[0].weight, layers[0].bias, stride=2)
        elif scale == 0.5:
            y = F.max_pool2d(y, 2)
        y = norm(F.conv2d(y, layers[-4].weight), layers[-3])
        maps.append(norm(F.conv2d(y, layers[-2].weight, padding=1), layers[-1]))
    return maps


@torch.no_grad()
def test_the_simple_pyramid_is_vitdet_s():
    vit = ViTConfig(**{**VIT, "patch_size": 16, "image_size": 64})
    model = make_model(vit, pyramid="simple", interaction_depths=[1, 2, 1, 1])
    (last,) = model.hsvlt.backbone(random_images(64, 96))
    expected = vitdet_pyramid(model.hsvlt.pyramid, last)
    maps = model(random_images(64, 96), output_hidden_states=True).hidden_states
    assert [tuple(each.shape[2:]) for each in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for ours, theirs in zip(maps, expected, strict=True):
        assert_close_outputs(ours, theirs)
    logits = model(random_images(64, 96)).logits
    assert_close_outputs(model(feature_maps=[last]).logits, logits)
    model.config.label_chunk_size = 2
    assert_close_outputs(model(random_images(64, 96)).logits, logits)


@pytest.mark.parametrize(("patch", "sides"), [(8, [16, 8, 4, 2]), (14, [16, 8, 4, 2]), (32, [16, 8, 4, 2])])
def test_the_simple_pyramid_has_four_strides_whatever_the_patch(patch, sides, tmp_path):
    size = {8: 64, 14: 56, 32: 64}[patch]
    vit = Dinov2Config(**{**VIT, "mlp_ratio": 2, "patch_size": patch, "image_size": size})
    model = make_model(vit, pyramid="simple", initializer_range=None).train()
    output = model(random_images(size, size), labels=torch.ones(2, 5), output_hidden_states=True)
    assert [each.shape[-1] for each in output.hidden_states] == sides
    output.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.hsvlt.backbone.requires_grad_(False)  # a frozen backbone leaves the pyramid to be learned
    assert all(parameter.requires_grad for parameter in model.hsvlt.pyramid.parameters())
    model.eval().save_pretrained(tmp_path)
    again = HSVLTForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close_outputs(again(random_images(size, size)).logits, model(random_images(size, size)).logits)


def test_the_simple_pyramid_is_for_one_scale():
    with pytest.raises(ValueError, match="swin has several"):
        make_model(SwinConfig(**SWIN, image_size=32), pyramid="simple")
    with pytest.raises(Exception, match="a convnext has four"):
        HSVLTConfig(pyramid="simple")
    with pytest.raises(Exception, match="pyramid must be one of"):
        make_config(DINO, pyramid="feature")


# ---- timm


@pytest.mark.parametrize("name", ["hf-hub:org/name", "local-dir:/tmp/x", "org/name", ""])
def test_a_configuration_names_an_architecture_of_timm_and_nothing_else(name):
    with pytest.raises(ValueError, match="no name of a timm architecture"):
        make_config(TimmBackboneConfig(backbone=name))


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
def test_without_timm_its_backbones_say_so():
    with pytest.raises(ImportError, match="'resnet10t' is one of timm, which is not installed: pip install timm"):
        make_model(TimmBackboneConfig(backbone="resnet10t"))
