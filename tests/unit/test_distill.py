"""The minmax step: invariants, and the known faults of the released code (one test each that would
catch it).
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncfm.augment import AugmentConfig
from ncfm.backend.compilation import can_compile
from ncfm.discrepancy import empirical_cf, ncfd
from ncfm.distill import DistillConfig, Distiller, NonFiniteLossError
from ncfm.extractors import ExtractorPool
from ncfm.formation import decode
from ncfm.frequencies import FrequencyConfig
from ncfm.images import ImageSpec
from ncfm.seeding import keyed_generator

SPEC = ImageSpec(
    channels=3,
    image_size=8,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    class_names=("a", "b", "c", "d", "e"),
)
EVERYTHING = DistillConfig(num_steps=30, real_batch=12, lr=0.02, calibration=0.1, chunk_size=16)
FREQUENCIES = FrequencyConfig(
    sampler="psi", num_freqs=64, num_components=4, noise_dim=4, hidden=16, lr=1e-2
)


class TinyNet(nn.Module):
    """Convolution, batch norm (so that there are buffers), pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.classifier = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Linear(32, 5),
        )
        self.num_features = 32

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def make_state(seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TinyNet()
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return net.state_dict()


def make_pool() -> ExtractorPool:
    return ExtractorPool(TinyNet(), [(make_state(i), make_state(100 + i)) for i in range(3)])


def initial(c: int, ipc: int = 2) -> Tensor:
    return torch.rand(ipc, 3, 8, 8, generator=keyed_generator(0, "test_initial", c))


def real_batch(c: int, step: int) -> Tensor:
    return torch.randint(
        0, 256, (12, 3, 8, 8), generator=keyed_generator(0, "test_real", c, step), dtype=torch.uint8
    )


def make(classes: Any = range(5), config: DistillConfig = EVERYTHING, **changes: Any) -> Distiller:
    arguments: dict[str, Any] = {
        "factor": 2,
        "spec": SPEC,
        "pool": make_pool(),
        "seed": 7,
        "config": config,
        "frequencies": FREQUENCIES,
        "augment": AugmentConfig(),
        "num_classes": 5,
    } | changes
    return Distiller({c: initial(c) for c in classes}, **arguments)


def run(distiller: Distiller, steps: int) -> dict[str, Tensor]:
    for _ in range(steps):
        distiller.update({c: real_batch(c, distiller.step) for c in distiller.images})
    return distiller.state_dict()


def without_psi(config: DistillConfig = EVERYTHING) -> dict[str, Any]:
    return {"config": config, "frequencies": dataclasses.replace(FREQUENCIES, sampler="gaussian")}


class TestInvariants:
    def test_the_discrepancy_falls(self) -> None:
        distiller = make(**without_psi(dataclasses.replace(EVERYTHING, calibration=0.0)))
        values = [
            float(distiller.update({c: real_batch(c, 0) for c in range(5)})["ncfd"])
            for _ in range(60)
        ]
        assert sum(values[-10:]) < 0.8 * sum(values[:10])

    def test_a_class_does_not_depend_on_the_others(self) -> None:
        """Fault 3: with fixed frequencies a class's images are the same whichever classes share its
        worker.
        """
        together, alone = run(make(**without_psi()), 5), run(make([3], **without_psi()), 5)
        torch.testing.assert_close(
            together["class/3/images"], alone["class/3/images"], atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            together["class/3/optimizer/exp_avg"], alone["class/3/optimizer/exp_avg"]
        )

    @pytest.mark.parametrize(
        ("per_network", "schedule"), [(False, "constant"), (True, "constant"), (False, "cosine")]
    )
    def test_resume_is_exact(self, per_network: bool, schedule: Any) -> None:
        """Fault 5: a run that is stopped and goes on equals the undisturbed one, bit for bit, psi
        included.
        """
        options: dict[str, Any] = {
            "frequencies": dataclasses.replace(FREQUENCIES, per_network=per_network),
            "config": dataclasses.replace(EVERYTHING, schedule=schedule),
        }
        undisturbed = run(make(**options), 8)
        resumed = make(**options)
        resumed.load_state_dict(run(make(**options), 3))
        state = run(resumed, 5)
        assert state.keys() == undisturbed.keys()
        for key, value in undisturbed.items():
            assert torch.equal(value, state[key]), key

    def test_the_seed_matters(self) -> None:
        """Fault 5 (seed 0 means unseeded): the same seed repeats, also zero; another does not."""
        zero = [run(make(seed=0), 2)["class/0/images"] for _ in range(2)]
        assert torch.equal(zero[0], zero[1])
        assert not torch.equal(zero[0], run(make(seed=1), 2)["class/0/images"])

    def test_pixels_stay_in_range(self) -> None:
        distiller = make(config=dataclasses.replace(EVERYTHING, lr=5.0))
        for _ in range(3):
            run(distiller, 1)
            for images in distiller.images.values():
                assert float(images.detach().min()) >= 0
                assert float(images.detach().max()) <= 1

    @pytest.mark.parametrize(
        "change", [{"chunk_size": 5}, {"chunk_size": 1000}, {"graph_images": 1}]
    )
    def test_how_it_is_computed_does_not_matter(self, change: dict[str, int]) -> None:
        double = dataclasses.replace(EVERYTHING, precision="float64")
        expected = run(make(config=double), 3)
        state = run(make(config=dataclasses.replace(double, **change)), 3)  # type: ignore[arg-type]
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, atol=1e-9, rtol=1e-9)

    def test_smaller_classes_are_used_whole(self) -> None:
        """Each image once: as if the few were a larger batch in which all come equally often."""

        def images(sizes: dict[int, int], repeat: int = 1) -> Tensor:
            distiller = make(config=dataclasses.replace(EVERYTHING, precision="float64"))
            batches = {c: real_batch(c, 0)[: sizes[c]].repeat(repeat, 1, 1, 1) for c in range(5)}
            distiller.update(batches)
            return torch.stack([p.detach() for p in distiller.images.values()])

        sizes = {c: 1 + 2 * c for c in range(5)}
        right = images(sizes)
        torch.testing.assert_close(images(sizes, 3), right, atol=1e-9, rtol=0)
        other = images({c: sizes[c] + 1 for c in range(5)})  # negative control
        assert all((a - b).abs().max() > 1e-6 for a, b in zip(other, right, strict=True))


class TestKnownFaults:
    @pytest.mark.parametrize("objective", ["ncfd", "excess", "ratio"])
    def test_psi_moves_and_moves_uphill(self, objective: str) -> None:
        """Fault 1: in the released code psi's gradient is exactly zero."""
        frequencies = dataclasses.replace(FREQUENCIES, objective=objective, lr=1e-4)  # type: ignore[arg-type]
        distiller = make(frequencies=frequencies)
        before = {
            n: p.detach().clone() for n, p in distiller.frequencies.sampler.named_parameters()
        }
        first = self.psi_objective(distiller)
        for name, parameter in distiller.frequencies.sampler.named_parameters():
            assert not torch.equal(before[name], parameter)
        # the same step once more, of the same images, under the psi that moved
        distiller.step = 0
        with torch.no_grad():
            for c in distiller.images:
                distiller.images[c].copy_(initial(c))
        assert self.psi_objective(distiller) > first

    def psi_objective(self, distiller: Distiller) -> float:
        """That of the next step, before psi moves."""
        return float(distiller.update({c: real_batch(c, 0) for c in range(5)})["psi_objective"])

    def test_the_faulty_update_would_be_caught(self) -> None:
        """Negative control of fault 1: descent and ascent summed into one gradient leave psi."""
        distiller = make(frequencies=dataclasses.replace(FREQUENCIES, lr=1e-4))
        x, y = torch.rand(6, 32), torch.rand(4, 32)
        parameters = list(distiller.frequencies.sampler.parameters())
        t = distiller.frequencies.sampler(torch.Generator().manual_seed(0))
        loss = ncfd(empirical_cf(x, t), empirical_cf(y, t))
        both = [torch.autograd.grad(sign * loss, parameters, retain_graph=True) for sign in (1, -1)]
        for up, down in zip(*both, strict=True):
            assert float(up.abs().max()) > 0
            assert not (up + down).any()

    def test_a_step_reads_no_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fault 5: the released code loads two checkpoints from disk at every step."""
        distiller = make()

        def refuse(*arguments: Any, **options: Any) -> Any:
            raise AssertionError(f"a step opened a file: {arguments}")

        for name in ("builtins.open", "io.open", "os.open", "torch.load"):
            monkeypatch.setattr(name, refuse)
        with pytest.raises(AssertionError):
            Path(__file__).read_bytes()  # the trap works
        before = [distiller.images[c].detach().clone() for c in range(5)]
        run(distiller, 3)
        assert not any(torch.equal(distiller.images[c], before[c]) for c in range(5))

    def test_nothing_asks_for_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fault 5: CUDA only."""

        def refuse(*arguments: Any, **options: Any) -> Any:
            raise AssertionError("CUDA was initialised")

        monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
        assert run(make(), 1)["class/0/images"].device.type == "cpu"

    def test_the_ascent_leaves_the_images_and_the_descent_leaves_psi(self) -> None:
        """Whatever psi ascends, this step's images do not feel it; and without an ascent the
        descent moves no psi.
        """
        one = make(frequencies=dataclasses.replace(FREQUENCIES, lr=1e-1))
        other = make(frequencies=dataclasses.replace(FREQUENCIES, lr=1e-9))
        start = {n: p.detach().clone() for n, p in other.frequencies.samplers.named_parameters()}
        states = [run(distiller, 1) for distiller in (one, other)]
        for c in range(5):
            images = [state[f"class/{c}/images"] for state in states]
            assert torch.equal(*images)
            assert not torch.equal(images[0], initial(c))
        for name, value in start.items():
            torch.testing.assert_close(states[1][f"psi/{name}"], value, rtol=0, atol=1e-8)
            assert not torch.allclose(states[0][f"psi/{name}"], value, rtol=0, atol=1e-3)
        second = [run(distiller, 1)["class/0/images"] for distiller in (one, other)]
        assert not torch.equal(*second)  # negative control: the next step's do

    def test_the_psi_of_the_step_s_network_moves_alone(self) -> None:
        distiller = make(frequencies=dataclasses.replace(FREQUENCIES, per_network=True))
        start = distiller.state_dict()
        member, _ = distiller.pool.draw(keyed_generator(7, "extractor", 0))
        state = run(distiller, 1)
        for name, _ in distiller.frequencies.samplers.named_parameters():
            moved = not torch.equal(state[f"psi/{name}"], start[f"psi/{name}"])
            assert moved == name.startswith(f"{member}.")
            assert (f"psi_optimizer/{name}/step" in state) == moved

    def test_one_optimiser_step_per_class_and_step(self) -> None:
        """Fault 3: one AdamW stepped once per class moves the other classes by their momentum."""
        distiller = make()
        state = run(distiller, 4)
        assert [int(state[f"class/{c}/optimizer/step"]) for c in range(5)] == [4] * 5

    def test_a_class_moves_by_one_optimiser_step_at_any_number_of_classes(self) -> None:
        """Fault 3: in its first step AdamW moves a pixel by the learning rate, whatever its
        gradient; stepped once a class, it would go on with five classes.
        """
        config = dataclasses.replace(EVERYTHING, weight_decay=0.0, lr=1e-3)
        for classes in ([0], range(5)):
            distiller = make(classes, **without_psi(config))
            before = distiller.images[0].detach().clone()
            run(distiller, 1)
            moves = (distiller.images[0].detach() - before).abs()
            assert float(moves.max()) == pytest.approx(1e-3, rel=1e-3)
            assert float(moves.median()) == pytest.approx(1e-3, rel=0.01)

    def test_frequencies_are_new_at_every_step_and_distinct(self) -> None:
        """Fault 2: only four distinct frequencies, K ignored."""
        distiller = make()
        first, _ = distiller._frequencies(0)
        assert len(torch.unique(first, dim=0)) == FREQUENCIES.num_freqs
        run(distiller, 1)
        assert not torch.equal(first, distiller._frequencies(0)[0])

    def test_the_step_uses_the_images_as_they_are(self) -> None:
        """Fault 4: synthetic images up to ten steps stale. Changing a class's pixels changes this
        very step's loss.
        """
        one, other = make(), make()
        with torch.no_grad():
            other.images[0].fill_(0.5)
        losses = [
            float(d.update({c: real_batch(c, 0) for c in range(5)})["ncfd"]) for d in (one, other)
        ]
        assert losses[0] != losses[1]

    def test_a_non_finite_loss_stops_before_anything_changes(self) -> None:
        distiller = make()
        broken = {c: real_batch(c, 0).float() / 255 for c in range(5)}
        broken[2][0, 0, 0, 0] = float("nan")
        with pytest.raises(NonFiniteLossError, match=r"step 0.*\[2\]"):
            distiller.update(broken)
        assert torch.equal(distiller.images[2], initial(2))

    def test_a_non_finite_gradient_of_a_finite_loss_stops_as_early(self) -> None:
        distiller = make(config=dataclasses.replace(EVERYTHING, loss_weight=1e39))
        with pytest.raises(NonFiniteLossError, match="its gradient"):
            run(distiller, 1)
        assert torch.equal(distiller.images[0], initial(0))


class TestPrecision:
    def test_float64_blends_the_extractor_too(self) -> None:
        """Converting the module alone would leave it with the weights that it had before."""
        single = make(**without_psi())
        double = make(**without_psi(dataclasses.replace(EVERYTHING, precision="float64")))
        states = [run(d, 3) for d in (single, double)]
        for c in range(5):
            torch.testing.assert_close(
                states[0][f"class/{c}/images"],
                states[1][f"class/{c}/images"].float(),
                atol=2e-3,
                rtol=0,
            )
        index, beta = double.pool.draw(keyed_generator(7, "extractor", 2))
        expected = make_state(index)["conv.weight"].lerp(
            make_state(100 + index)["conv.weight"], beta
        )
        double.pool.blend(index, beta)
        torch.testing.assert_close(
            double.pool.models[0].state_dict()["conv.weight"].float(), expected
        )

    def test_bfloat16_is_the_extractor_s_alone(self) -> None:
        """Images, psi and losses are float32; the losses are those of float32 to three digits."""
        single, low = (
            make(config=dataclasses.replace(EVERYTHING, precision=precision))
            for precision in ("float32", "bfloat16")
        )
        metrics = [d.update({c: real_batch(c, 0) for c in range(5)}) for d in (single, low)]
        for name, value in metrics[0].items():
            assert float(metrics[1][name]) == pytest.approx(float(value), rel=1e-2)
            assert not torch.equal(metrics[1][name], value)  # negative control
        assert {v.dtype for k, v in low.state_dict().items() if k != "step"} == {torch.float32}
        weight = low.pool.models[0].state_dict()["conv.weight"]
        assert weight.dtype == torch.bfloat16
        index, beta = low.pool.draw(keyed_generator(7, "extractor", 0))
        low.pool.blend(index, beta)
        expected = make_state(index)["conv.weight"].lerp(
            make_state(100 + index)["conv.weight"], beta
        )
        torch.testing.assert_close(
            low.pool.models[0].state_dict()["conv.weight"], expected.bfloat16()
        )

    def test_compiled_bfloat16_is_the_same_whoever_has_the_other_classes(self) -> None:
        if not can_compile("cpu"):
            pytest.skip("torch.compile does not work here: it needs a C++ compiler")
        fast = without_psi(dataclasses.replace(EVERYTHING, precision="bfloat16", compile=True))
        whole = run(make(**fast), 4)
        for classes in ([0, 3], [1, 2, 4]):
            part = run(make(classes, **fast), 4)
            for c in classes:
                assert torch.equal(part[f"class/{c}/images"], whole[f"class/{c}/images"])


class TestSchedule:
    @pytest.mark.parametrize(("step", "part"), [(0, 1.0), (10, 0.75), (15, 0.5), (20, 0.25)])
    def test_cosine_scales_the_move_of_a_step(self, step: int, part: float) -> None:
        """(1 + cos(pi step / 30)) / 2 of the move at a constant rate from the same images."""
        config = dataclasses.replace(
            EVERYTHING, optimizer="sgd", lr=1.0, momentum=0.0, loss_weight=1.0, weight_decay=0.0
        )
        moves = []
        for schedule in ("constant", "cosine"):
            distiller = make(**without_psi(dataclasses.replace(config, schedule=schedule)))
            distiller.step = step
            with torch.no_grad():
                for images in distiller.images.values():
                    images.mul_(0.2).add_(0.4)
            before = distiller.images[0].detach().clone()
            run(distiller, 1)
            moves.append(distiller.images[0].detach() - before)
        assert moves[0].abs().max() > 1e-3
        torch.testing.assert_close(moves[1], part * moves[0], atol=1e-6, rtol=1e-3)


class TestClipping:
    def gradients(self, **changes: Any) -> dict[int, Tensor]:
        """Moves of one SGD step of rate 1 from mid-grey: the gradients, each class's own."""
        config = dataclasses.replace(
            EVERYTHING, optimizer="sgd", lr=1.0, loss_weight=1e-2, weight_decay=0.0, **changes
        )
        distiller = make(**without_psi(config))
        with torch.no_grad():
            for c in distiller.images:
                distiller.images[c].mul_(0.2).add_(0.4)
        before = {c: p.detach().clone() for c, p in distiller.images.items()}
        run(distiller, 1)
        return {c: before[c] - p.detach() for c, p in distiller.images.items()}

    def test_off_by_default(self) -> None:
        assert DistillConfig().clip_grad_norm is None
        assert DistillConfig().clip_grad_value is None

    def test_by_norm_class_by_class(self) -> None:
        free = self.gradients()
        norms = sorted(float(g.norm()) for g in free.values())
        clipped = self.gradients(clip_grad_norm=norms[2])
        for c, gradient in free.items():
            factor = min(1.0, norms[2] / float(gradient.norm()))
            torch.testing.assert_close(clipped[c], gradient * factor, atol=1e-6, rtol=1e-3)

    def test_by_value(self) -> None:
        free = self.gradients()
        limit = 0.5 * max(float(g.abs().max()) for g in free.values())
        clipped = self.gradients(clip_grad_value=limit)
        for c, gradient in free.items():
            torch.testing.assert_close(
                clipped[c], gradient.clamp(-limit, limit), atol=1e-6, rtol=1e-3
            )


class TestExtractors:
    @pytest.mark.parametrize(("blend", "offset"), [((0.0, 0.0), 0), ((1.0, 1.0), 100)])
    def test_random_or_trained_networks_alone(
        self, blend: tuple[float, float], offset: int
    ) -> None:
        config = dataclasses.replace(EVERYTHING, blend=blend, calibration=0.0)
        distiller = make(**without_psi(config))
        run(distiller, 1)
        weight = distiller.pool.models[0].state_dict()["conv.weight"]
        assert any(torch.equal(weight, make_state(offset + i)["conv.weight"]) for i in range(3))

    def test_blend_is_the_lerp_of_weights_and_buffers(self) -> None:
        pool = make_pool()
        state = pool.blend(1, 0.3).state_dict()
        for name, value in make_state(1).items():
            if value.is_floating_point():
                torch.testing.assert_close(state[name], value.lerp(make_state(101)[name], 0.3))

    def test_no_gradient_reaches_the_weights(self) -> None:
        distiller = make()
        run(distiller, 1)
        assert all(
            p.grad is None and not p.requires_grad for p in distiller.pool.models[0].parameters()
        )

    def test_an_empty_pool_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            ExtractorPool(TinyNet(), [])


class TestObjectives:
    def test_linear_mmd_in_the_same_loop(self) -> None:
        """DM: the mean features approach those of the real images; there is nothing to sample."""
        config = dataclasses.replace(EVERYTHING, objective="mmd", calibration=0.0)
        distiller = make(config=config)
        assert distiller.frequencies.optimizer is None
        values = []
        for _ in range(60):
            metrics = distiller.update({c: real_batch(c, 0) for c in range(5)})
            assert set(metrics) == {"mmd"}  # and is not called a NCFD
            values.append(float(metrics["mmd"]))
        assert sum(values[-10:]) < 0.7 * sum(values[:10])

    def test_the_linear_mmd_is_that_of_its_definition(self) -> None:
        """|mean x - mean y|^2 of normalised features, summed over the classes, and not its root."""
        config = dataclasses.replace(EVERYTHING, objective="mmd", calibration=0.0, blend=(1.0, 1.0))
        distiller = make(config=config, augment=AugmentConfig(strategy="none"))
        member, beta = distiller.pool.draw(distiller._generator("extractor"), config.blend)
        model, expected = distiller.pool.blend(member, beta), 0.0
        for c in range(5):
            sets = real_batch(c, 0) / 255, decode(initial(c), 2)
            with torch.no_grad():
                x, y = (
                    nn.functional.normalize(model.features((images - 0.5) / 0.25)).mean(0)
                    for images in sets
                )
            expected += float((x - y).square().sum())
        found = distiller.update({c: real_batch(c, 0) for c in range(5)})
        assert float(found["mmd"]) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize(
        ("objective", "normalize"), [("mmd", True), ("mmd_raw", False), ("ncfd", True)]
    )
    def test_the_value_is_that_of_the_features(self, objective: Any, normalize: bool) -> None:
        """Without augmentation and formation, one step: what is logged, from the features of the
        drawn network.
        """
        config = dataclasses.replace(EVERYTHING, objective=objective, calibration=0.0)
        distiller = make(factor=1, augment=AugmentConfig(strategy="none"), **without_psi(config))
        t, _ = distiller._frequencies(0)
        member, beta = distiller.pool.draw(keyed_generator(7, "extractor", 0), config.blend)
        real = {c: real_batch(c, 0) for c in range(5)}
        found = distiller.update(real)
        assert set(found) == {objective}
        model, expected = make_pool().blend(member, beta), torch.zeros(())
        for c in range(5):
            images = (real[c] / 255, initial(c))
            x, y = (model.features(SPEC.normalize(side)) for side in images)
            if normalize:
                x, y = (nn.functional.normalize(side, dim=-1) for side in (x, y))
            if objective == "ncfd":
                expected += ncfd(empirical_cf(x, t), empirical_cf(y, t))
            else:
                expected += (x.mean(0) - y.mean(0)).square().sum()
        torch.testing.assert_close(found[objective], expected, rtol=1e-4, atol=1e-6)

    def test_calibration_makes_the_trained_network_sure(self) -> None:
        config = dataclasses.replace(EVERYTHING, calibration=50.0, loss_weight=1e-3)
        distiller = make(**without_psi(config))
        values = [
            float(distiller.update({c: real_batch(c, 0) for c in range(5)})["calibration"])
            for _ in range(60)
        ]
        assert sum(values[-10:]) < 0.9 * sum(values[:10])

    @pytest.mark.parametrize(
        "change",
        [
            {"blend": (0.5, 0.2)},
            {"blend": (0.0, 1.5)},
            {"clip_grad_norm": 0.0},
            {"clip_grad_value": -1.0},
            {"alpha": 1.1},
            {"calibration": -1.0},
            {"lr": 0.0},
            {"calibration_ahead": (0, 6)},  # from a blend
            {"calibration_ahead": (3, 2), "extractor": "snapshot"},
            {"calibration_ahead": (-1, 2), "extractor": "snapshot"},
        ],
    )
    def test_impossible_values_are_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="got"):
            dataclasses.replace(EVERYTHING, **change)

    @pytest.mark.parametrize("bandwidth", ["fixed", "median"])
    def test_several_ascents(self, bandwidth: Any) -> None:
        frequencies = dataclasses.replace(FREQUENCIES, ascents=3, bandwidth=bandwidth)
        state = run(make(frequencies=frequencies), 2)
        assert int(state["psi_optimizer/0.hidden.weight/step"]) == 6


class TestFrequencies:
    @pytest.mark.parametrize("sampler", ["gaussian", "psi"])
    def test_the_curriculum_scales_the_frequencies(self, sampler: Any) -> None:
        plain = make(frequencies=dataclasses.replace(FREQUENCIES, sampler=sampler))
        changed = {"sampler": sampler, "curriculum_start": 0.25, "curriculum_steps": 4}
        rising = make(frequencies=dataclasses.replace(FREQUENCIES, **changed))
        for step, factor in ((0, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)):
            plain.step = rising.step = step
            torch.testing.assert_close(rising._frequencies(0)[0], factor * plain._frequencies(0)[0])

    @pytest.mark.parametrize("sampler", ["mixture", "matern", "imq"])
    def test_the_discrepancy_falls(self, sampler: Any) -> None:
        changed = {"sampler": sampler, "bandwidth": "median", "curriculum_steps": 20}
        config = dataclasses.replace(EVERYTHING, calibration=0.0)
        distiller = make(config=config, frequencies=dataclasses.replace(FREQUENCIES, **changed))
        real = {c: real_batch(c, 0) for c in range(5)}
        values = [float(distiller.update(real)["ncfd"]) for _ in range(40)]
        assert sum(values[-10:]) < 0.9 * sum(values[:10])


class TestTrajectories:
    """Extractors and the cross-entropy from snapshots of training."""

    STATES = tuple(make_state(200 + i) for i in range(4))

    def one_step(self, **changes: Any) -> dict[str, float]:
        config = dataclasses.replace(EVERYTHING, **changes)
        pool = ExtractorPool(TinyNet(), [self.STATES], epochs=(0, 2, 4, 6))
        augment = AugmentConfig(strategy="none")
        distiller = make(factor=1, augment=augment, pool=pool, **without_psi(config))
        found = distiller.update({c: real_batch(c, 0) for c in range(5)})
        return {name: float(value) for name, value in found.items()}

    @pytest.mark.parametrize("ahead", [(0, 0), (2, 2), (1, 2), (100, 100), None])
    def test_values_are_those_of_the_snapshots(self, ahead: tuple[int, int] | None) -> None:
        generator = keyed_generator(7, "extractor", 0)
        torch.randint(1, (), generator=generator), torch.rand((), generator=generator)
        snapshot = int(torch.randint(4, (2,), generator=generator)[0])
        assert snapshot < 3  # so that there is something ahead
        steps = {(0, 0): 0, (2, 2): 1, (1, 2): 1, (100, 100): 3, None: 3}
        later = min(3, snapshot + steps[ahead])
        found = self.one_step(
            extractor="snapshot", calibration_ahead=ahead, objective="mmd_raw", calibration=2.0
        )
        distance = entropy = 0.0
        for c in range(5):
            networks = [TinyNet().eval(), TinyNet().eval()]
            for network, index in zip(networks, (snapshot, later), strict=True):
                network.load_state_dict(self.STATES[index])
            images, target = SPEC.normalize(initial(c)), torch.full((2,), c)
            with torch.no_grad():
                x = networks[0].features(SPEC.normalize(real_batch(c, 0) / 255))
                y = networks[0].features(images)
                entropy += float(nn.functional.cross_entropy(networks[1](images), target))
            distance += float((x.mean(0) - y.mean(0)).square().sum())
        assert found["mmd_raw"] == pytest.approx(distance, rel=1e-4)
        assert found["calibration"] == pytest.approx(entropy, rel=1e-4)

    def test_a_run_goes_on_exactly(self) -> None:
        config = dataclasses.replace(
            EVERYTHING, extractor="snapshot_blend", calibration_ahead=(0, 2), inner_steps=2
        )

        def fresh() -> Distiller:
            return make(config=config, pool=ExtractorPool(TinyNet(), [self.STATES] * 2))

        whole, resumed = run(fresh(), 6), fresh()
        resumed.load_state_dict(run(fresh(), 3))
        state = run(resumed, 3)
        assert all(torch.equal(value, state[name]) for name, value in whole.items())
        other = make(pool=ExtractorPool(TinyNet(), [self.STATES] * 2))  # negative control
        assert not torch.equal(run(other, 6)["class/0/images"], whole["class/0/images"])
