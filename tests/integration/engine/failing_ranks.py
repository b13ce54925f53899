"""Mixed into the ranks of ``test_lost_stages``: makes one of them fail from its next step on."""

from __future__ import annotations

from drumline.workers.model_runner import ModelRunner


class Saboteur:
    """``self`` is a :class:`drumline.workers.Worker` too."""

    rank: int
    model_runner: ModelRunner

    def raise_in_steps(self, rank: int) -> bool:
        """Whether this is the rank whose steps raise now."""
        if self.rank != rank:
            return False

        def fail(*_: object) -> None:
            raise LookupError(f"rank {rank} was told to")

        self.model_runner.model.hidden = fail  # type: ignore[method-assign, assignment]
        return True

    def poison_weights(self, rank: int) -> bool:
        """Whether this is the rank whose first norm is NaN now."""
        if self.rank == rank:
            self.model_runner.model.layers[0].input_norm.weight.fill_(float("nan"))
        return self.rank == rank
