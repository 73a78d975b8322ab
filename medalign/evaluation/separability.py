"""How well visual tokens of a region separate from others: linear probe, silhouette, neighbors, t-SNE.

| score | meaning | chance |
| --- | --- | --- |
| probe | balanced accuracy of logistic regression on tokens of images that it was not fitted to | 1 / classes |
| silhouette | mean silhouette with the cosine distance, -1 to 1 | 0 |
| neighbors | share of the NEIGHBORS nearest tokens of other images (cosine) with the same label | that of all of them |

Findings have typical places, so a probe can score without looking: `position` is the balanced accuracy of the same
probe on the row and the column of the token's patch, and is the same for all blocks.

Shape suffixes: T tokens, D size of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from medalign.errors import ConfigError
from medalign.evaluation.metrics.intervals import RESAMPLES

FOLDS = 5
NEIGHBORS = 5
PERPLEXITY = 30.0


@dataclass(frozen=True)
class Labels:
    """What is known of the chosen tokens.

    Attributes:
        label_T: the class of each token, as text.
        image_T: the image of each token, int64.
        place_T: row and column of its patch, [T, 2].
    """

    label_T: np.ndarray
    image_T: np.ndarray
    place_T: np.ndarray

    @property
    def classes(self) -> list[str]:
        """The classes, sorted."""
        return sorted(set(self.label_T.tolist()))

    @property
    def usable(self) -> bool:
        """Whether there are two classes, each in as many images as there are folds."""
        images = [len(set(self.image_T[self.label_T == one].tolist())) for one in self.classes]
        return len(images) > 1 and min(images) >= FOLDS


def require_scikit_learn() -> None:
    """Raise ConfigError if scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        raise ConfigError("scikit-learn is not installed; install it with: pip install 'medalign[separability]'")


def separability(tokens_TD: np.ndarray, labels: Labels) -> dict[str, float]:
    """Compute the scores of the table above, the probe with an interval over images.

    Args:
        tokens_TD: the tokens.
        labels: usable ones.
    """
    from sklearn.metrics import silhouette_score

    return {
        **probe(tokens_TD, labels),
        "silhouette": float(silhouette_score(tokens_TD, labels.label_T, metric="cosine")),
        "neighbors": float(_same_label(_nearest(tokens_TD, labels.image_T), labels.label_T).mean()),
    }


def chance(labels: Labels) -> dict[str, float]:
    """Return what the scores are without any information, and the probe on positions."""
    rows, columns = labels.place_T.T
    one_hot = np.concatenate([np.eye(rows.max() + 1)[rows], np.eye(columns.max() + 1)[columns]], axis=1)
    same = (labels.label_T[:, None] == labels.label_T).astype(np.float64)
    elsewhere = labels.image_T[:, None] != labels.image_T
    position = {f"position{name.removeprefix('probe')}": value for name, value in probe(one_hot, labels).items()}
    by_chance = float(((same * elsewhere).sum(1) / elsewhere.sum(1)).mean())
    return {"probe": 1 / len(labels.classes), **position, "silhouette": 0.0, "neighbors": by_chance}


def probe(tokens_TD: np.ndarray, labels: Labels) -> dict[str, float]:
    """Return the balanced accuracy of logistic regression, with its interval over images.

    Each image is predicted once, by a probe that was fitted to the images of the other folds. Classes count equally.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    hit_T = np.zeros(len(labels.label_T))
    for fit, held in GroupKFold(FOLDS).split(tokens_TD, groups=labels.image_T):
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        hit_T[held] = model.fit(tokens_TD[fit], labels.label_T[fit]).predict(tokens_TD[held]) == labels.label_T[held]
    return _balanced("probe", hit_T, labels)


def _balanced(name: str, hit_T: np.ndarray, labels: Labels) -> dict[str, float]:
    """Return the mean over classes of the share of hits, with the quantiles of its bootstrap over images."""
    _, image_T = np.unique(labels.image_T, return_inverse=True)
    own = [labels.label_T == one for one in labels.classes]
    parts = [(np.bincount(image_T, own_T * hit_T), np.bincount(image_T, own_T)) for own_T in own]
    draw = np.random.default_rng(0).integers(0, image_T.max() + 1, (RESAMPLES, image_T.max() + 1))
    with np.errstate(invalid="ignore"):  # a resample without a class
        drawn = np.nanmean([hits[draw].sum(1) / counts[draw].sum(1) for hits, counts in parts], axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = np.mean([hits.sum() / counts.sum() for hits, counts in parts])
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


def _nearest(tokens_TD: np.ndarray, image_T: np.ndarray) -> np.ndarray:
    """Return the nearest tokens of other images, [T, NEIGHBORS]."""
    unit_TD = tokens_TD / np.linalg.norm(tokens_TD, axis=1, keepdims=True)
    similarity = np.where(image_T[:, None] == image_T, -np.inf, unit_TD @ unit_TD.T)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBORS]


def _same_label(nearest: np.ndarray, label_T: np.ndarray) -> np.ndarray:
    result: np.ndarray = label_T[nearest] == label_T[:, None]
    return result


def embed(tokens_TD: np.ndarray) -> np.ndarray:
    """Return t-SNE coordinates [T, 2], from PCA and with a fixed seed."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(tokens_TD) - 1) / 3)
    found: np.ndarray = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(tokens_TD)
    return found
