"""The networks: shapes, gradients everywhere, direct coding, the unfused network, the size of SEW-ResNet18."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from unfused import Unfused, unfused

from sadp_fast import SADP, BatchNormLIF, models
from sadp_fast.lab.models.spikformer import SpikingSelfAttention
from sadp_fast.memory.packed_spikes import packed_spikes
from sadp_fast.nn.lif import LIFNode
from sadp_fast.nn.node import reset
from sadp_fast.surrogate import ATan

SHAPES = {"image": (1, 8, 8), "colour": (3, 16, 12), "events": (3, 2, 9, 8)}


def make(name, shape, classes=5, steps=3, seed=0):
    torch.manual_seed(seed)
    return models.build(name, shape, classes, steps)


def calibrated(model, images):
    """In evaluation, with the running statistics of these images: a fresh network would be silent there."""
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            module.momentum = 1.0
    with torch.no_grad():
        model(images)
    reset(model)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", models.NAMES)
def test_forward_and_backward(name, shape, device):
    model = make(name, shape).to(device)
    output = model(torch.randn(6, *shape, device=device))
    assert output.shape == (6, 5)
    nn.functional.cross_entropy(output, torch.arange(6, device=device) % 5).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


@pytest.mark.parametrize("name", models.NAMES)
def test_direct_coding_is_the_same_frame_at_every_step(name):
    """An image, whose stem runs once, gives what event frames that repeat it give."""
    shape = (2, 9, 8)
    images = torch.randn(4, *shape, dtype=torch.float64)
    image_model = calibrated(make(name, shape).double(), images)
    event_model = make(name, (3, *shape)).double().eval()
    event_model.load_state_dict(image_model.state_dict())
    calls = []
    image_model.stem.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[0]))
    output = image_model(images)
    torch.testing.assert_close(output, event_model(images[:, None].expand(-1, 3, -1, -1, -1)))
    assert output.std(dim=0).min() > 0
    assert calls == [4]


@pytest.mark.parametrize("name", models.NAMES)
def test_output_is_the_mean_over_time_and_forgets_after_reset(name):
    images = torch.randn(3, 1, 8, 8)
    model = calibrated(make(name, (1, 8, 8), steps=4), images)
    steps = []
    model.body[-1].register_forward_hook(lambda module, inputs, output: steps.append(output))
    first = model(images)
    reset(model)
    second = model(images)
    assert steps[0].shape == (4, 3, 5) and torch.equal(first, steps[0].mean(0)) and torch.equal(first, second)
    assert not torch.equal(first, model(images))  # without a reset the potential is still there


def spikes_of(model, into):
    """Keep what its neurons give from now on, the residual included."""
    inside = [module.node for module in model.modules() if isinstance(module, Unfused)]
    for module in model.modules():
        if isinstance(module, (LIFNode, Unfused)) and module not in inside:
            module.register_forward_hook(lambda _, inputs, output: into.append(output.detach()))


def gradients(model, images, labels):
    spikes = []
    spikes_of(model, spikes)
    output = model(images)
    nn.functional.cross_entropy(output, labels).backward()
    return spikes, output, [parameter.grad for parameter in model.parameters()]


def tensors_of(result, model):
    """What a pass of `gradients` and the model's buffers are compared by, one after the other."""
    _, output, grads = result
    return [output, *grads, *model.buffers()]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", models.NAMES)
def test_trains_as_the_network_of_plain_layers(name, shape, device):
    """The same network of nn.BatchNorm and LIFNode: outputs, gradients and running statistics."""
    model = make(name, shape).to(device, torch.float64)
    plain = unfused(model)
    images, labels = torch.randn(6, *shape, dtype=torch.float64), torch.arange(6, device=device) % 5
    passes = [gradients(network, images.to(device), labels) for network in (model, plain)]
    for ours, theirs in zip(*map(tensors_of, passes, (model, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", models.NAMES)
def test_is_as_exact_in_float32_as_the_network_of_plain_layers(name, shape, device):
    """What float32 loses in all the layers, against the network of plain layers in float64.

    A neuron whose potential meets the threshold to the last bit may fire in one of the three alone, after which they
    differ: such networks are left for others, of other weights.
    """
    for seed in range(16):
        model = make(name, shape, seed=seed).to(device)
        plain = unfused(model)
        truth = copy.deepcopy(plain).double()
        images, labels = torch.randn(6, *shape).to(device), torch.arange(6, device=device) % 5
        networks = (model, plain, truth)
        passes = [gradients(network, images.to(network.body[-1][-1].weight.dtype), labels) for network in networks]
        (spikes, *_), (plain_spikes, *_), (true_spikes, *_) = passes
        assert len(spikes) == len(plain_spikes) == len(true_spikes) > 1
        if all(a.equal(b) and a.double().equal(c) for a, b, c in zip(spikes, plain_spikes, true_spikes, strict=True)):
            break
    else:
        pytest.fail("spikes differ in every network")
    for ours, theirs, exact in zip(*map(tensors_of, passes, networks), strict=True):
        error, plain_error = (torch.linalg.vector_norm(x.double() - exact) for x in (ours, theirs))
        size = torch.linalg.vector_norm(exact.double())
        assert plain_error <= 1e-3 * size + 1e-9  # or the comparison says nothing
        assert error <= 2 * plain_error + 3e-6 * size + 1e-9


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", models.NAMES)
def test_is_scored_as_the_network_of_plain_layers(name, training, device):
    """Energies from BatchNormLIF, residual sums included, against counts, scaled norms and reductions.

    As above, a network is left for another on a GPU where a neuron fires in one of the two alone.
    """
    for seed in range(4, 5 if device == "cpu" else 12):
        torch.manual_seed(seed)
        images, labels = torch.randn(24, 3, 8, 8, device=device), torch.arange(24, device=device) % 5
        model = make(name, (3, 8, 8), seed=seed).to(device)
        model(images)  # running statistics
        reset(model)
        plain = unfused(model)
        scores, spikes = [], ([], [])
        for network, its_spikes in zip((model, plain), spikes, strict=True):
            spikes_of(network, its_spikes)
            sadp = SADP(network.train(training), 24, epochs=8, warmup_epochs=2, tail_epochs=0, weights="unbiased")
            for _ in range(2):
                for index in sadp.batches(6):
                    sadp.loss(nn.CrossEntropyLoss(), network(images[index]), labels[index]).backward()
                    reset(network)
                scores.append(sadp.scores.clone())
            assert not any(node.collect_statistics for node in network.modules() if isinstance(node, LIFNode))
            described = sadp.describe()
        assert len(spikes[0]) == len(spikes[1]) > 8
        if all(map(torch.equal, *spikes)):
            break
    else:
        pytest.fail("spikes differ in every network")
    assert scores[0].min() > 0
    for other in scores[1:] if not training else (scores[2],):  # in training, batches are others in every epoch
        torch.testing.assert_close(scores[0], other, rtol=1e-3, atol=1e-7)
    if training:
        torch.testing.assert_close(scores[1], scores[3], rtol=1e-3, atol=1e-7)
    assert "scaled through" in described


@pytest.mark.parametrize("build", [lambda model: model, unfused], ids=["fused", "plain"])
def test_neurons_may_be_reset_before_the_backward_pass(build, device):
    """As training does to let activations go early: what the scores need is not lost with the neurons' state."""
    images, labels = torch.randn(24, 3, 8, 8, device=device), torch.arange(24, device=device) % 5
    scores = []
    for early in (False, True):
        model = build(make("conv", (3, 8, 8)).to(device))
        sadp = SADP(model, 24, epochs=8, warmup_epochs=2, weights="unbiased")
        for _ in range(2):
            for index in sadp.batches(6):
                loss = sadp.loss(nn.CrossEntropyLoss(), model(images[index]), labels[index])
                for backward in (False, True) if early else (True, False):
                    loss.backward() if backward else reset(model)
        scores.append(sadp.scores.clone())
    assert scores[0].isfinite().all() and torch.equal(*scores)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_the_kernels_score_as_the_network_of_plain_layers(name, kernel_device):
    """As above, of small images, with every neuron's kernels: in the interpreter where there is no GPU."""
    torch.manual_seed(4)
    images, labels = torch.randn(8, 1, 4, 4, device=kernel_device), torch.arange(8, device=kernel_device) % 5
    model = make(name, (1, 4, 4), steps=2).to(kernel_device)
    plain = unfused(model)
    for node in model.modules():
        if isinstance(node, BatchNormLIF):
            node.backend = "triton"
    scores = []
    for network in (model, plain):
        sadp = SADP(network, 8, epochs=8, warmup_epochs=1, weights="unbiased")
        for index in sadp.batches(4):
            sadp.loss(nn.CrossEntropyLoss(), network(images[index]), labels[index]).backward()
            reset(network)
        scores.append(sadp.scores.clone())
    assert scores[0].min() > 0
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", models.NAMES)
def test_every_hidden_layer_is_measured_by_its_neuron(name):
    model = make(name, (3, 8, 8))
    sadp = SADP(model, 12, epochs=8, warmup_epochs=2, weights="unbiased")
    for index in sadp.batches(6):
        sadp.loss(nn.CrossEntropyLoss(), model(torch.randn(6, 3, 8, 8)), index % 5).backward()
        reset(model)
    lines = sadp.describe().splitlines()
    reduced_inputs = [line for line in lines if ": reduction" in line]
    reduced_gradients = [line for line in lines if "x reduction" in line]
    # The image, what pooling gives, and the gradient of the classifier are all that no neuron knows.
    known = {"mlp": 1, "conv": 3, "sew_resnet18": 2, "spiking_vgg": 5, "vggsnn": 5, "spikformer": 3}
    assert len(reduced_inputs) == known[name], lines
    assert len(reduced_gradients) == 1 and reduced_gradients[0] == lines[-1]


def test_reading_the_dataflow_keeps_no_spikes():
    """In low-memory training the first batch, too, leaves nothing but bits of what the convolutions have read."""
    model, storages = make("sew_resnet18", (3, 8, 8)), []
    for layer in model.modules():
        if isinstance(layer, models.PerStep):
            layer.register_forward_hook(
                lambda _, inputs, __: storages.append(StorageWeakRef(inputs[0].untyped_storage()))
            )
    sadp = SADP(model, 6, epochs=8)
    index = next(batches := sadp.batches(6))
    with packed_spikes():
        loss = sadp.loss(nn.CrossEntropyLoss(), model(torch.randn(6, 3, 8, 8)), index % 5)
    assert len(storages) == 20 and all(storage.expired() for storage in storages)
    loss.backward()
    batches.close()


@pytest.mark.parametrize("name", models.NAMES)
def test_neurons_fire(name):
    """Freshly made networks neither stay silent nor fire without end, so gradients flow through every layer."""
    model = make(name, (3, 16, 16), steps=4)
    rates, behind_products = [], []  # the latter in Spikformer, behind those of three spikes
    for module in model.modules():
        if isinstance(module, LIFNode):
            into = behind_products if type(module) is LIFNode else rates
            module.register_forward_hook(  # of the spikes alone, without the residual
                lambda _, inputs, output, into=into: into.append((output - sum(inputs[1:])).mean().item())
            )
    model(torch.randn(16, 3, 16, 16))
    assert rates and min(rates) > 0.005 and max(rates) < 0.5, rates
    assert all(0.005 < rate < 0.55 for rate in behind_products), behind_products
    assert bool(behind_products) == (name == "spikformer")


def test_sew_resnet18_is_the_published_network():
    """ResNet18 with the 3x3 stem for small images has 11,173,962 parameters at 10 classes, with the 7x7 stem for
    ImageNet 11,689,512 at 1,000 classes; 17 convolutions, 3 of shortcuts, and as many neurons."""
    small = make("sew_resnet18", (3, 32, 32), classes=10)
    assert sum(parameter.numel() for parameter in small.parameters()) == 11_173_962
    assert sum(isinstance(module, nn.Conv2d) for module in small.modules()) == 20
    assert sum(isinstance(module, LIFNode) for module in small.modules()) == 20
    large = make("sew_resnet18", (3, 96, 96), classes=1000)
    assert sum(parameter.numel() for parameter in large.parameters()) == 11_689_512
    sizes = []
    for block in large.body[-9:-1]:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    with torch.no_grad():
        large(torch.randn(1, 3, 96, 96))
    assert sizes == [24, 24, 12, 12, 6, 6, 3, 3]


@pytest.mark.parametrize(
    ("name", "sides"),
    [("spiking_vgg", [32, 16, 8, 8, 4, 4, 2, 2]), ("vggsnn", [32, 32, 16, 16, 8, 8, 4, 4])],
)
def test_spiking_vggs_are_the_published_networks(name, sides):
    """9,217,728 weights of convolutions, as VGG-11 has; each sees an image of 32x32 pixels pooled so far."""
    model = make(name, (3, 32, 32), classes=10)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(module.weight.numel() for module in convolutions) == 9_217_728 and len(convolutions) == 8
    seen = []
    for convolution in convolutions:
        convolution.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    classifier_inputs = []
    model.body[-1].register_forward_pre_hook(lambda module, inputs: classifier_inputs.append(inputs[0].shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    assert seen == sides and classifier_inputs == [sides[-1] // 2]
    small = make(name, (3, 4, 4))
    assert sum(isinstance(module, nn.MaxPool2d) for module in small.modules()) == 2
    assert make(name, (2, 2, 70, 34), steps=2)(torch.randn(1, 2, 2, 70, 34)).shape == (1, 5)


@pytest.mark.parametrize(
    ("shape", "classes", "published", "tokens", "blocks"),
    [
        ((3, 32, 32), 10, 9.32e6, (8, 8), 4),
        ((10, 2, 128, 128), 10, 2.57e6, (8, 8), 2),
        ((3, 224, 224), 1000, 29.68e6, (14, 14), 8),
        ((2, 2, 9, 8), 10, None, (5, 4), 2),
    ],
    ids=["4-384", "2-256", "8-512", "tiny"],
)
def test_spikformer_has_the_published_sizes(shape, classes, published, tokens, blocks):
    """Parameters as the paper counts them, some of whose linear layers have biases, which the normalisation removes."""
    with torch.device("meta"):
        model = make("spikformer", shape, classes=classes, steps=shape[0] if len(shape) == 4 else 2)
    attentions = [module for module in model.modules() if isinstance(module, SpikingSelfAttention)]
    assert len(attentions) == blocks
    width = attentions[0].neuron.num_features
    biases = blocks * (3 + 1 + 4 + 1) * width
    if published:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parameters - 0.005e6 <= published <= parameters + biases + 0.005e6
    map_ = torch.zeros(1, *shape[-2:])
    for module in model.body:
        pooling = module[0] if isinstance(module, models.PerStep) else None
        map_ = pooling(map_) if isinstance(pooling, nn.MaxPool2d) else map_
    assert map_.shape[1:] == tokens


def test_self_attention_is_the_papers(device):
    """Q K^T V s, written as the paper does, in its order and one head at a time; and the sum with what came in."""
    torch.manual_seed(0)
    attention = SpikingSelfAttention(24, 3).double().to(device)
    inputs = torch.randint(0, 3, (4, 2, 24, 3, 2)).to(device).double()
    seen = {}
    for name in ("qkv_neuron", "attention_neuron", "neuron"):
        attention.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    output = attention(inputs)
    q, k, v = seen["qkv_neuron"][1].flatten(3).chunk(3, dim=2)
    expected = []
    for head in torch.arange(24, device=device).chunk(3):
        q_h, k_h, v_h = (part[:, :, head].transpose(-2, -1) for part in (q, k, v))  # tokens x channels
        expected.append((q_h @ k_h.transpose(-2, -1) @ v_h * 256 / (8 * 6)).transpose(-2, -1))
    torch.testing.assert_close(seen["attention_neuron"][0], torch.stack(expected, 2))
    spikes = output - inputs
    assert ((spikes == 0) | (spikes == 1)).all() and 0 < spikes.mean() < 1
    assert torch.equal(attention.projection(seen["attention_neuron"][1].reshape(inputs.shape)), seen["neuron"][0])


def test_self_attention_is_spikingjellys():
    """At its fixed scale, that of 64 tokens and 32 channels a head: output, gradients of input and weights."""
    peer = pytest.importorskip("spikingjelly.activation_based.layer.attention", reason="SpikingJelly is not installed")
    torch.manual_seed(0)
    ours = SpikingSelfAttention(64, 2).double()
    theirs = peer.SpikingSelfAttention(64, 2, surrogate_function=ATan()).double()
    theirs.qkv_conv_bn[0].weight.data.copy_(ours.qkv[0].weight.data.squeeze(-1))
    theirs.proj_conv_bn[0].weight.data.copy_(ours.projection[0].weight.data.squeeze(-1))
    for neuron in (ours.qkv_neuron, ours.neuron):  # ours take their input whole, with another surrogate
        neuron.decay_input, neuron.surrogate_function = True, ATan()
    for norm in (ours.qkv_neuron, ours.neuron, theirs.qkv_conv_bn[1], theirs.proj_conv_bn[1]):
        nn.init.constant_(norm.bias, 0.5)  # so that random inputs make enough spikes
    x = torch.randint(0, 2, (4, 3, 64, 8, 8)).double()
    results = []
    for module, flat, first in ((ours, False, ours.qkv), (theirs, True, theirs.qkv_conv_bn)):
        given = (x.flatten(3) if flat else x.clone()).requires_grad_()
        output = module(given) + (given if flat else 0)
        (output.flatten(3) * torch.linspace(-1, 1, 64, dtype=torch.float64)).sum().backward()
        results.append((output.flatten(3), given.grad.flatten(3), first[0].weight.grad.flatten()))
    assert results[0][0].sub(x.flatten(3)).mean() > 0.01 and results[0][2].abs().max() > 0
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", models.NAMES)
def test_neurons_settings(name):
    """Input is taken whole, but by the neurons behind Spikformer's attention, which are those of its reference code."""
    neurons = [module for module in make(name, (1, 8, 8)).modules() if isinstance(module, LIFNode)]
    for node in neurons:
        published = type(node) is LIFNode
        assert node.v_threshold == (0.5 if published else 1.0)
        assert node.tau == 2.0 and node.decay_input == published and node.detach_reset and node.step_mode == "m"
        assert type(node.surrogate_function).__name__ == ("ATan" if published else "PiecewiseQuadratic")
    assert neurons


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg", (1, 8, 8), 10, 4), "unknown model 'vgg'"),
        (("mlp", (1, 8, 8), 10, 0), "time_steps is 0"),
        (("mlp", (5, 2, 8, 8), 10, 4), "time_steps is 4 but the event frames have 5"),
        (("conv", (1, 3, 8), 10, 4), "at least 4x4 pixels, not 3x8"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(*arguments)


def test_logits_are_float32_under_autocast(device):
    model, steps = make("conv", (3, 8, 8)).to(device), []
    model.body[-1].register_forward_hook(lambda module, inputs, output: steps.append(output))
    with torch.autocast(device, torch.bfloat16):
        output = model(torch.randn(6, 3, 8, 8, device=device))
    assert steps[0].dtype == torch.bfloat16 and output.dtype == torch.float32
    torch.testing.assert_close(output, steps[0].float().mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv", "sew_resnet18"])
def test_channels_last_is_kept_through_the_network(name):
    model = make(name, (3, 32, 32)).to("cuda", memory_format=torch.channels_last)
    layouts = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, output: layouts.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                    and output.is_contiguous(memory_format=torch.channels_last)
                )
            )
    images = torch.randn(4, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        model(images).sum().backward()
    assert layouts and all(layouts)
