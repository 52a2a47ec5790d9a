"""NCFM: dataset distillation by neural characteristic function matching, as a library on torch.

Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective", CVPR
2025, arXiv 2502.20653. `distill` learns a few images per class whose features have the same
characteristic function as those of the real images; the step is `distill.Distiller.update`.

From the paper to the code:

| Paper | Here |
|---|---|
| eq. 5: phi(t) = mean exp(j <t, x>), from additive sums | `discrepancy.empirical_cf`, `cf_sums`, `cf_from_sums` |
| eq. 7: NCFD = mean over t of sqrt(chf(t)) | `discrepancy.ncfd`, `smooth_sqrt` |
| eq. 8: chf = alpha amplitude + (1 - alpha) phase | `discrepancy.chf`, `amplitude_part`, `phase_part`, `DistillConfig.alpha` |
| 4.2.2: t from a scale mixture of normals, scales from psi | `frequencies.ScaleMixture`, `FrequencyConfig.num_freqs`, `num_components` |
| table 5, psi off: fixed t; other laws of its scale | `frequencies.FixedFrequencies`, `frequencies.LAWS` |
| max over psi | `matching.Match.objective`, `add_scale_gradients`, `frequencies.psi_objective`, `psi.PsiGradient` |
| min over the images | `matching.Match.descent`, `distill.Distiller.update` |
| extractor: lerp(initial, trained, beta), beta ~ U(0, 1) | `extractors.ExtractorPool.draw`, `blend`, `DistillConfig.blend` |
| calibration: cross-entropy under the trained network | `distill.Distiller._calibrate`, `DistillConfig.calibration` |
| multi-formation (IDC) | `formation.encode`, `decode`, `SyntheticConfig.factor` |
| Siamese augmentation (DSA) | `augment.Augment`, `views.SiameseViews` |
| curation: soft labels, then hard ones | `curation.soft_labels`, `train.train` |
| evaluation: a fresh network trained on the set, tested once | `evaluate.train_and_test`, `augment.cutmix` |
| DM: distance of mean features, in the same loop | `discrepancy.linear_mmd`, `objectives.LinearMMD`, `RawLinearMMD` |
| DANCE, TGDD: a later network's cross-entropy, snapshots | `DistillConfig.calibration_ahead`, `extractor`, `extractors.ExtractorPool.draw_step` |
| frequencies at which the real classes differ most (ours) | `psi.between_classes`, `FrequencyConfig.objective`, `held_out` |
| PAD, RDED, DREAM: easy images, first images | `DistillConfig.easy_fraction`, `SyntheticConfig.choose`, `selection.first_images` |
| FKD: soft labels of every augmented view | `curation.ViewLabels`, `view_label_bytes`, `CurateConfig.per_view` |
| baselines: random, same-factor random, herding | `baselines.random_set`, `herding`, `herding_set` |

Where it differs from the released code:

- psi's scales are bounded (`FrequencyConfig.max_ratio`), and it ascends the discrepancy in units of
  `discrepancy.sampling_floor`: plain ascent follows sampling noise to ever higher frequencies. The
  default is a fixed sampler (tests/benchmarks/study says why).
- The images descend first; psi ascends after, on the same features, cosines and sines.
- Every class takes exactly one optimiser step per step, of matching and calibration together, at a
  constant learning rate.
- Soft labels are the mean over the pool, stored with the set.
"""  # noqa: E501

from ncfm.api import Settings, distill, evaluate
from ncfm.synthetic import SyntheticSet
from ncfm.synthetic import load_synthetic as load

__all__ = ["Settings", "SyntheticSet", "distill", "evaluate", "load"]
