"""The model: shapes of any size, one path for training and streaming, precisions, saving and loading."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIG
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, Dinov2Backbone, Dinov2Config

from hf_deformvos import DeformVosConfig, DeformVosModel
from hf_deformvos.memory_deformvos import MemoryBank
from hf_deformvos.modeling_deformvos import MASKED_LOGIT


TEACHER_CONFIG = {
    **TINY_CONFIG,
    "backbone": "dinov2",
    "backbone_config": {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 56,
        "patch_size": 14,
        "out_indices": [2],
        "apply_layernorm": False,
    },
    "num_hidden_layers": 2,
}
VARIANTS = {
    "student": TINY_CONFIG,
    "teacher": TEACHER_CONFIG,
    "grid": {**TINY_CONFIG, "short_term_form": "grid", "num_hidden_layers": 2},
    "object_dependent": {**TINY_CONFIG, "object_independent": False, "num_hidden_layers": 2},
    "no_tail": {**TINY_CONFIG, "backbone_tail": False},
    "no_offsets": {**TINY_CONFIG, "use_offsets": False},
}


@pytest.fixture(params=VARIANTS)
def any_model(request):
    torch.manual_seed(0)
    return DeformVosModel(DeformVosConfig(**VARIANTS[request.param])).eval()


def clip(height=65, width=81, frames=3, batch=2, objects=2):
    masks = torch.zeros(batch, frames, height, width, dtype=torch.long)
    for number in range(1, objects + 1):
        masks[:, :, (number - 1) * height // objects : number * height // objects, : width // 2] = number
    return torch.randn(batch, frames, 3, height, width), masks


@pytest.mark.parametrize("size", [(65, 81), (49, 33), (17, 97), (1, 65), (33, 1), (1, 1)])
def test_any_size(any_model, size):
    pixel_values, masks = clip(*size)
    output = any_model(pixel_values, masks[:, :1], 2, output_attentions=True, output_hidden_states=True)
    height, width = ((side - 1) // 4 + 1 for side in size)
    assert output.logits.shape == (2, 2, 3, height, width)
    assert torch.isfinite(output.logits).all()
    tokens = ((size[0] - 1) // 16 + 1) * ((size[1] - 1) // 16 + 1)
    for layers in output.attentions:
        for maps in layers:
            assert set(maps) == {"long_term", "short_term", "self"}
            for attention in maps.values():
                assert attention.shape[:2] == (2, tokens)
                torch.testing.assert_close(attention.sum(-1), torch.ones(2, tokens))
    assert len(output.hidden_states[0]) == len(output.sampled_locations[0]) == any_model.config.num_hidden_layers


def test_gradients_reach_every_weight_that_is_trained(any_model):
    any_model.train()
    any_model.backbone.freeze_pretrained()
    # An untrained offset network passes nothing to the layers before its zero convolution.
    for name, parameter in any_model.named_parameters():
        if name.endswith("offset.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    pixel_values, masks = clip(97, 113)
    output = any_model(pixel_values, masks, 2, memory_interval=1)
    F.cross_entropy(output.logits.flatten(0, 1), masks[:, 1:, ::4, ::4].flatten(0, 1)).backward()
    unused = {"offset_network"} if not any_model.config.use_offsets else set()
    lacking = [
        name
        for name, parameter in any_model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and not unused & set(name.split("."))
    ]
    # Layer 0 of a deeper model hands its identification state on; a single layer uses everything.
    assert not lacking


def test_batch_norm_is_frozen_in_training(tiny_model):
    tiny_model.train()
    statistics = copy.deepcopy({k: v for k, v in tiny_model.state_dict().items() if "running" in k})
    pixel_values, masks = clip()
    tiny_model(pixel_values, masks, 2)
    assert all(torch.equal(v, tiny_model.state_dict()[k]) for k, v in statistics.items())


def test_gradient_checkpointing_changes_nothing(tiny_config):
    pixel_values, masks = clip()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = DeformVosModel(copy.deepcopy(tiny_config)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixel_values, masks, 2, teacher_forcing=1.0).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    for arguments in ({"use_reentrant": True}, {}):
        with pytest.raises(ValueError, match=r'needs `\{"use_reentrant": False\}`'):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def test_a_batch_may_count_the_objects_of_each_clip(tiny_model):
    """As a collator of transformers stacks them."""
    pixel_values, masks = clip()
    with torch.no_grad():
        logits = tiny_model(pixel_values, masks, torch.tensor([2, 1])).logits
        exists = torch.tensor([[True, True], [True, False]])
        expected = tiny_model(pixel_values, masks, 2, object_valid=exists).logits
    assert torch.equal(logits, expected) and not torch.equal(logits, tiny_model(pixel_values, masks, 2).logits)


def test_every_trainable_parameter_of_a_teacher_gets_a_gradient():
    """Or several processes would wait for it."""
    model = DeformVosModel(DeformVosConfig(**TEACHER_CONFIG)).train()
    model(*clip(), 2, teacher_forcing=1.0).logits.square().mean().backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []


def test_gradient_checkpointing_saves_memory():
    def saved_bytes(checkpointing):
        torch.manual_seed(0)
        model = DeformVosModel(DeformVosConfig(**TINY_CONFIG)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(*clip(), 2)
        assert output.logits.requires_grad
        return sum(count for address, count in seen.items() if address not in weights)

    assert saved_bytes(True) < 0.4 * saved_bytes(False)


def test_the_frozen_vit_stays_in_evaluation_mode():
    torch.manual_seed(0)
    vit = {**TEACHER_CONFIG["backbone_config"], "drop_path_rate": 0.5, "hidden_dropout_prob": 0.5}
    model = DeformVosModel(DeformVosConfig(**{**TEACHER_CONFIG, "backbone_config": vit})).train()
    pixel_values = torch.randn(1, 3, 65, 81)
    with torch.no_grad():
        assert torch.equal(model.backbone(pixel_values)[-1], model.backbone(pixel_values)[-1])
    assert model.training and model.layers.training


def rolled_gradients(model, gradient_frames, autocast):
    """Gradients of the last two frames' loss, by name, of a clip of five."""
    torch.manual_seed(0)
    pixel_values, masks = clip(frames=5)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(pixel_values, masks, 2, memory_interval=2, gradient_frames=gradient_frames)
    output.logits[:, -2:].float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


@pytest.mark.parametrize("autocast", [False, True])
def test_frames_rolled_without_gradients_only_lack_theirs(tiny_model, autocast):
    """The same maps, and a gradient for the same weights: autocast's cache must not cut them off."""
    tiny_model.train()
    whole_logits, whole = rolled_gradients(tiny_model, None, autocast)
    logits, gradients = rolled_gradients(tiny_model, 2, autocast)
    torch.testing.assert_close(logits, whole_logits)
    assert gradients.keys() == whole.keys()
    lost = [name for name, gradient in gradients.items() if whole[name].any() and not gradient.any()]
    assert not lost
    # Frames that nothing learned from is written by have none to give.
    _, all_of_them = rolled_gradients(tiny_model, 4, autocast)
    for name, gradient in all_of_them.items():
        torch.testing.assert_close(gradient, whole[name])
    assert any(not torch.allclose(gradients[name], whole[name]) for name in whole)


def test_gradient_frames_out_of_range_are_refused(tiny_model):
    with pytest.raises(ValueError, match="`gradient_frames` must be at least 1, got 0"):
        tiny_model(*clip(), 2, gradient_frames=0)


def test_slots_are_interchangeable_in_the_interface(tiny_model):
    """Objects listed in another order, with their slots, give the same maps in that order."""
    pixel_values, masks = clip()
    swapped = torch.where(masks == 0, masks, 3 - masks)
    slots = torch.tensor([[4, 7], [0, 2]])
    one = tiny_model(pixel_values, masks, 2, object_slots=slots).logits
    other = tiny_model(pixel_values, swapped, 2, object_slots=slots.flip(1)).logits
    torch.testing.assert_close(one, other[:, :, [0, 2, 1]], atol=1e-5, rtol=1e-4)


def test_absent_objects_are_masked_and_do_not_matter(tiny_model):
    pixel_values, masks = clip(objects=1)
    valid = torch.tensor([[True, False], [True, False]])
    padded = tiny_model(pixel_values, masks, 2, object_valid=valid).logits
    alone = tiny_model(pixel_values, masks, 1).logits
    assert (padded[:, :, 2] == MASKED_LOGIT).all()
    torch.testing.assert_close(padded[:, :, :2], alone, atol=1e-5, rtol=1e-4)
    for wrong in (valid.float(), valid.long(), valid[:, :1], valid[:1], torch.ones(2, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"`object_valid` must be \(2, 2\) of bool, got "):
            tiny_model(pixel_values, masks, 2, object_valid=wrong)


def test_teacher_forcing_decides_what_enters_memory(tiny_model):
    pixel_values, masks = clip()
    own = tiny_model(pixel_values, masks, 2, teacher_forcing=0.0).logits
    forced = tiny_model(pixel_values, masks, 2, teacher_forcing=1.0).logits
    torch.testing.assert_close(own[:, 0], forced[:, 0])
    assert not torch.allclose(own[:, 1], forced[:, 1])
    mixed = tiny_model(pixel_values, masks, 2, teacher_forcing=torch.tensor([[False] * 3, [True] * 3])).logits
    torch.testing.assert_close(mixed, torch.stack([own[0], forced[1]]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(variant, dtype):
    torch.manual_seed(0)
    model = DeformVosModel(DeformVosConfig(**VARIANTS[variant])).eval()
    pixel_values, masks = clip(97, 129)
    with torch.no_grad():
        reference = model(pixel_values, masks, 2).logits.softmax(2)
        output = model.to(dtype)(pixel_values.to(dtype), masks, 2).logits
    assert output.dtype == dtype
    assert (output.float().softmax(2) - reference).abs().mean() < 0.02


def test_visual_branch_ignores_the_objects(tiny_model):
    """With `object_independent`, every attention map is the same whatever the masks are."""
    pixel_values, masks = clip()
    one = tiny_model(pixel_values, masks, 2, output_attentions=True).attentions
    other = tiny_model(pixel_values, masks.flip(-1), 2, output_attentions=True).attentions
    for frame, other_frame in zip(one, other, strict=True):
        for name, attention in frame[0].items():
            torch.testing.assert_close(attention, other_frame[0][name])


@pytest.mark.parametrize("variant", ["student", "teacher"])
def test_a_dot_falls_on_the_same_token_for_both_backbones(variant):
    """The teacher's token grid is the student's: a dot on pixel (48, 80) is strongest in token (3, 5)."""
    backbone = DeformVosModel(DeformVosConfig(**VARIANTS[variant])).eval().backbone
    blank = torch.zeros(1, 3, 113, 145)
    dotted = blank.clone()
    dotted[:, :, 46:51, 78:83] = 1.0
    with torch.no_grad():
        if variant == "student":
            # Averaging everywhere: the response spreads evenly around the place where it comes from.
            for module in backbone.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.weight.fill_(1.0 / module.weight[0].numel())
            change = (backbone(dotted)[2] - backbone(blank)[2]).abs().sum(1)[0]
        else:
            # Attention is global: look at what the patch embedding is given.
            seen = []
            patches = backbone.vit.embeddings.patch_embeddings
            patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            backbone(blank)
            backbone(dotted)
            change = (seen[1] - seen[0]).abs().sum(1)[0].unflatten(0, (-1, 14)).unflatten(2, (-1, 14)).sum((1, 3))
    assert change.shape == (8, 10)
    assert divmod(int(change.argmax()), change.shape[1]) == (3, 5)


def test_step_compiles_without_graph_breaks(tiny_model):
    def step(pixel_values, masks):
        features = tiny_model.encode_images(pixel_values)
        bank = MemoryBank(2)
        bank.write(tiny_model.remember_reference(features, masks, 0), to_long_term=True)
        segmentation = tiny_model.segment(features, bank)
        return tiny_model.remember(segmentation.projections, segmentation.logits.softmax(1), 1).layers[0].values

    masks = torch.rand(1, 11, 17, 21)
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        frame = torch.randn(1, 3, 65, 81)
        torch.testing.assert_close(compiled(frame, masks), step(frame, masks))


def test_round_trip_in_half_precision_loads_in_full(tiny_model, tmp_path):
    tiny_model.save_release(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    num_parameters = sum(parameter.numel() for parameter in tiny_model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * num_parameters + 2e5
    assert next(tiny_model.parameters()).dtype == torch.float32, "saving leaves the model as it was"
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, DeformVosModel)
    assert loaded.dtype == torch.float32
    for name, tensor in tiny_model.half().float().state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_pretrained_initialises_nothing_anew(variant, tmp_path):
    model = DeformVosModel(DeformVosConfig(**VARIANTS[variant]))
    model.save_pretrained(tmp_path)
    loaded, report = DeformVosModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_folded_step_compiles_without_graph_breaks(tiny_model):
    folded = copy.deepcopy(tiny_model).fold_batch_norm().backbone
    frame = torch.randn(1, 3, 65, 81)
    with torch.no_grad():
        for one, other in zip(
            torch.compile(folded, fullgraph=True, backend="eager")(frame), folded(frame), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert folded(frame)[-1].dtype == torch.bfloat16, "autocast reaches a folded backbone"
    with pytest.raises(ValueError, match=r"eval\(\)"):
        tiny_model.train().fold_batch_norm()


def test_folded_batch_norm_gives_the_same_masks(tiny_model):
    for module in tiny_model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    pixel_values, masks = clip()
    with torch.no_grad():
        before = tiny_model(pixel_values, masks, 2).logits
        after = tiny_model.fold_batch_norm()(pixel_values, masks, 2).logits
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in tiny_model.modules())
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="folded"):
        tiny_model.save_pretrained("never-written")


def test_backbone_is_loaded_by_name(tiny_model, tmp_path):
    weights = {
        name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in tiny_model.backbone.state_dict().items()
    }
    save_file({**weights, "classifier.1.weight": torch.zeros(2)}, tmp_path / "backbone.safetensors")
    tiny_model.load_backbone(tmp_path / "backbone.safetensors")
    assert torch.equal(tiny_model.backbone.features[0][0].weight, weights["features.0.0.weight"])
    del weights["features.3.conv.2.weight"]
    save_file(weights, tmp_path / "partial.safetensors")
    with pytest.raises(ValueError, match=r"features\.3\.conv\.2\.weight"):
        tiny_model.load_backbone(tmp_path / "partial.safetensors")


def test_vit_is_loaded_up_to_the_block_that_is_used(tmp_path):
    settings = TEACHER_CONFIG["backbone_config"]
    deeper = Dinov2Backbone(Dinov2Config(**{**settings, "num_hidden_layers": 3, "out_indices": [3]}))
    deeper.save_pretrained(tmp_path / "deeper")
    teacher = DeformVosModel(DeformVosConfig(**TEACHER_CONFIG))
    teacher.load_backbone(str(tmp_path / "deeper"))
    for name, tensor in teacher.backbone.vit.state_dict().items():
        assert torch.equal(tensor, deeper.state_dict()[name]), name
    Dinov2Backbone(Dinov2Config(**{**settings, "num_hidden_layers": 1, "out_indices": [1]})).save_pretrained(
        tmp_path / "shallow"
    )
    with pytest.raises(ValueError, match=r"layer\.1\."):
        teacher.load_backbone(str(tmp_path / "shallow"))


def test_untrained_model_reads_its_memory_at_the_reference_points():
    """Of the whole model, as it is made: that single modules start so does not say that the model lets them."""
    model = DeformVosModel(DeformVosConfig(**TEACHER_CONFIG)).eval()
    pixel_values, masks = clip()
    with torch.no_grad():
        moved = model(pixel_values, masks, 2, output_attentions=True)
        for module in model.modules():
            if hasattr(module, "use_offsets"):
                module.use_offsets = False
        fixed = model(pixel_values, masks, 2, output_attentions=True)
    torch.testing.assert_close(moved.logits, fixed.logits)
    for layers, others in zip(moved.sampled_locations, fixed.sampled_locations, strict=True):
        for layer, other in zip(layers, others, strict=True):
            for name in layer:
                assert torch.equal(layer[name], other[name].expand_as(layer[name])), name


def test_a_teacher_that_takes_over_a_students_weights_starts_as_that_student(tiny_model):
    teacher = DeformVosModel(DeformVosConfig(**TEACHER_CONFIG)).eval()
    left = teacher.load_state_dict(tiny_model.state_dict(), strict=False)
    assert not left.unexpected_keys
    pixel_values, masks = clip()
    with torch.no_grad():
        torch.testing.assert_close(
            teacher(pixel_values, masks, 2).logits, tiny_model(pixel_values, masks, 2).logits, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet"}, "backbone"),
        ({"short_term_form": "dense"}, "short_term_form"),
        ({"short_term_window": 4}, "odd"),
        ({"max_offset": 0.0}, "max_offset"),
        ({"max_displacement": float("nan")}, "max_displacement"),
        ({"long_term_slots": 0}, "long_term_slots"),
        ({"correlation_radius": -1}, "correlation_radius"),
        ({"decoder_sizes": [96, 64]}, "decoder_sizes"),
        ({"decoder_sizes": [96, 64, 50]}, "decoder_sizes"),
        ({"backbone_config": {}}, "backbone_config"),
        ({"hidden_size": "128"}, "hidden_size"),
    ],
)
def test_configuration_is_validated(change, message):
    with pytest.raises(Exception, match=message):
        DeformVosConfig(**change)


def test_a_misspelt_field_is_warned_of(tmp_path, warnings_of_package):
    config = DeformVosConfig(**TINY_CONFIG, num_labels=3, torch_dtype="float32", output_attentions=True)
    config.save_pretrained(tmp_path)
    DeformVosModel(DeformVosConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    DeformVosModel.from_pretrained(tmp_path, attn_implementation="eager", output_hidden_states=True)
    assert warnings_of_package.text == ""
    DeformVosConfig(long_term_slot=5)
    assert "has no long_term_slot: a misspelt field keeps its default" in warnings_of_package.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p, y: m(), "inference_session"),
        (lambda m, p, y: m(p[:, :1], y[:, :1], 2), "frames >= 2"),
        (lambda m, p, y: m(p[..., :-1], y[..., :-1], 2), "16k"),
        (lambda m, p, y: m(p, y[..., :-4], 2), "id_masks"),
        (lambda m, p, y: m(p, y, 0), "num_objects"),
        (lambda m, p, y: m(p, y, 11), "max_objects"),
        (lambda m, p, y: m(p, y, 2, object_slots=torch.zeros(1, 2, dtype=torch.long)), "object_slots"),
        (lambda m, p, y: m(p, y, 2, object_slots=torch.tensor([[0, 1], [3, 3]])), "each at most once"),
        (lambda m, p, y: m(p, y, 2, object_slots=torch.tensor([[0, 1], [3, 99]])), "0 to"),
        (lambda m, p, y: m(p, y, 2, memory_interval=0), "`memory_interval` must be at least 1, got 0"),
        (lambda m, p, y: m(p, y[:, :1], 2, teacher_forcing=1.0), "needs the masks of all 3 frames, got .* 1"),
        (
            lambda m, p, y: m(p, y[:, :1], 2, teacher_forcing=torch.ones(len(p), 3, dtype=torch.bool)),
            "asks for frames that `id_masks` lacks: it holds the first 1 of 3",
        ),
        (
            lambda m, p, y: m(p, y, 2, teacher_forcing=torch.ones(3, dtype=torch.bool)),
            r"`teacher_forcing` must be \(2, 3\), got \(3,\)",
        ),
    ],
)
def test_bad_clips_are_refused(tiny_model, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model, *clip())
