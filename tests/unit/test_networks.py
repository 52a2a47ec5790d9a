"""The set that an evaluation task trains on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from upath import UPath

from ncfm.curation import CurateConfig
from ncfm.images import ImageSpec
from ncfm.models import ModelConfig
from ncfm.synthetic import SyntheticSet
from ncfm.train import TrainConfig
from pipeline.data.pool import Pool
from pipeline.stages.networks import EvaluationTask, SetName

SPEC = ImageSpec(
    channels=1, image_size=4, mean=(0.5,), std=(0.5,), class_names=("cat", "dog", "cow")
)


@pytest.mark.parametrize("name", ["distilled", "distilled_soft"])
@pytest.mark.parametrize("classes", [None, (2, 0)])
def test_a_distilled_set_is_of_the_tasks_classes(
    tmp_path: Path, name: SetName, classes: tuple[int, ...] | None
) -> None:
    images = torch.arange(6).view(6, 1, 1, 1).expand(6, 1, 4, 4) / 10  # two of each class
    soft = torch.eye(3).repeat_interleave(2, 0)
    labels = torch.arange(3).repeat_interleave(2)
    SyntheticSet(images, labels, 1, SPEC, soft_labels=soft).save(tmp_path)
    store: Any = SimpleNamespace(spec=SPEC)
    task = EvaluationTask(
        set=name,
        repeat=0,
        identity="",
        store=store,
        distilled=UPath(tmp_path),
        pool=Pool(directory=UPath(tmp_path), models=(ModelConfig(),), networks=1),
        curate=CurateConfig(),
        model=ModelConfig(),
        training=TrainConfig(),
        hard_epochs=0,
        classes=classes,
        ipc=(2, 2, 2),
        factor=1,
        seed=0,
    )
    ((batch, targets),) = task.training_set("cpu").epoch(10, None)
    found = targets.argmax(1) if targets.ndim == 2 else targets
    assert sorted(set(found.tolist())) == sorted(classes or (0, 1, 2))
    assert [round(float(image[0, 0, 0]) * 10) // 2 for image in batch] == found.tolist()
    assert (targets.ndim == 2) == (name == "distilled_soft")
