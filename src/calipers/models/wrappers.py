"""Models that can only be called: functions from arrays to arrays.

They become modules without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from calipers.errors import BadInput, BadModel

Kind = Literal["scores", "probabilities", "labels"]


class BlackBox(nn.Module):
    """A function of NumPy arrays as a module without gradients.

    Maps (N, *D) to scores (N, K), for black-box attacks. There is no graph, so nothing can be
    certified.

    Args:
        function: called with a NumPy array (N, *D); returns what `kind` says.
        kind: "scores" (N, K) of any scale (or (N,): one decision score of two classes),
            "probabilities" (N, K), which become log-probabilities, or "labels" (N,) from 0 to
            `classes` - 1, which become +1 at the label and -1 elsewhere.
        classes: the number of classes; needed for "labels" only.
        flat: pass rows (N, d) to the function instead of (N, *D).
        name: stands for the function in the record's identity of the model. A function's weights
            cannot be seen, so change the name when they change.
        dtype: of the points that the function is given.

    Raises:
        BadInput: if `function` cannot be called, for an unknown kind, or for labels without
            `classes`; on a call `BadModel` for an array of the wrong shape or labels out of range.

    Example:
        >>> import numpy as np
        >>> BlackBox(lambda x: np.stack([x.sum(1), 0 * x.sum(1)], 1))(torch.ones(1, 2)).tolist()
        [[2.0, 0.0]]
    """

    anchor: Tensor
    no_graph: str = ""
    """Why there are no bounds, where something better than "a function" can be said."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        kind: Kind = "scores",
        *,
        classes: int | None = None,
        flat: bool = False,
        name: str = "function",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not callable(function):
            raise BadInput(f"BlackBox wraps a function of arrays, got {type(function).__name__}")
        if kind not in ("scores", "probabilities", "labels"):
            raise BadInput(f"kind is 'scores', 'probabilities' or 'labels', got {kind!r}")
        if kind == "labels" and (classes is None or classes < 2):
            raise BadInput(
                "labels alone do not say how many classes there are: give classes=K, at least 2, "
                f"got {classes}"
            )
        self.function, self.kind, self.classes, self.flat, self.name = (
            function,
            kind,
            classes,
            flat,
            name,
        )
        # names of the classes in the order of the outputs, where these are not 0, 1, 2, ...
        self.labels: Any = None
        self.features: Any = None  # names of the columns, where the function knows them
        self.register_buffer("anchor", torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (N, K) of points (N, *D)."""
        rows = x.detach().cpu().flatten(1) if self.flat else x.detach().cpu()
        # a copy, since the function may keep or change its argument
        found = np.asarray(self.function(np.array(rows.numpy())))
        if found.ndim not in (1, 2) or len(found) != len(x):
            raise BadModel(
                f"the function must return one row a point; for {len(x)} points it returned an "
                f"array of shape {found.shape}"
            )
        if self.kind == "labels":
            return self._signs(found).to(x)
        answer = torch.as_tensor(np.array(found, dtype=np.float64))
        if self.kind == "probabilities":
            if answer.dim() == 1 or answer.shape[1] == 1:
                one = answer.reshape(-1, 1)
                answer = torch.cat([1 - one, one], 1)
            answer = torch.where(
                answer.isnan(), answer, answer.clamp(torch.finfo(torch.float32).tiny, 1.0)
            ).log()
        return answer.to(x)

    def _signs(self, labels: np.ndarray[Any, Any]) -> Tensor:
        """Return labels (N,) as +1 at the label and -1 elsewhere, (N, K)."""
        place = torch.as_tensor(labels.reshape(-1).astype(np.int64))
        classes = self.classes or 0
        if bool(((place < 0) | (place >= classes)).any()):
            raise BadModel(
                f"labels must lie in 0..{classes - 1}, got {int(place.min())}..{int(place.max())}"
            )
        return 2.0 * nn.functional.one_hot(place, classes) - 1.0

    def extra_repr(self) -> str:
        """Return what distinguishes this model from another one."""
        return f"{self.name}, kind={self.kind}, classes={self.classes}"

    def __deepcopy__(self, memo: dict[int, Any]) -> BlackBox:
        """Return a copy that shares the function.

        Sessions and estimators need not be copyable, and nothing here writes to them.
        """
        made = BlackBox(
            self.function,
            self.kind,
            classes=self.classes,
            flat=self.flat,
            name=self.name,
            dtype=self.anchor.dtype,
        )
        made.labels, made.features = self.labels, self.features
        made.no_graph = self.no_graph
        return made
