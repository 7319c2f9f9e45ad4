"""The experiments of the papers: what is trained, on what, for how long.

The numbers are those of the configurations of the authors' code, `pzzhang/sasa`
(``src/config/*.yaml`` and the commands of its README). docs/papers.md says which are in
the papers too. Rates are those of normalised momentum.
"""

import dataclasses
from typing import Literal

# With fewer samples a test says nothing. It is the limit of `sasa_optax.Window`, too.
_FEWEST_SAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a run is.

    Attributes:
      epochs: passes over the training data.
      epochs_per_drop: the epochs between the drops of the hand-tuned schedule; None if
        it drops after each epoch that does not improve the validation loss.
      width: the channels of the first stage, or the units of a layer.
      dropout: the rate of dropout.
      num_train: examples or tokens of the training data that are used; None for all.
      num_test: images of the test that are used; None for all.
      image_size: the height and width to which images are averaged; None to keep them.
    """

    epochs: int
    epochs_per_drop: int | None
    width: int
    dropout: float = 0.0
    num_train: int | None = None
    num_test: int | None = None
    image_size: int | None = None

    def lasting(self, epochs: int) -> "Scale":
        """The same for another number of epochs, with the drops in proportion."""
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}.")
        between = self.epochs_per_drop
        if between is not None:
            between = max(1, round(between * epochs / self.epochs))
        return dataclasses.replace(self, epochs=epochs, epochs_per_drop=between)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """An experiment.

    Attributes:
      name: the name on the command line, which is that of the data set.
      stand_in: the data of the reduced runs.
      model: "resnet18-small", the form for small images; "resnet18"; or "lstm".
      unit: of the test metric: "% error", or "perplexity".
      batch_size: examples, or texts side by side, in a mini-batch.
      rate: the initial rate of all methods that do not find it.
      momentum: beta of normalised momentum.
      weight_decay: coupled.
      decoupled_decay: that of AdamW, which the papers do not have.
      drop_factor: what a drop divides the rate by; SLOPE has its own.
      samples: the fewest samples of a test of SASA and SASA+.
      steps_per_epoch: in the published run. In a shorter epoch, tests need fewer
        samples in proportion.
      published: the run of the papers.
      reduced: a run for two cores of a CPU.
      bptt: tokens of a window of text.
      clip: the largest norm of a gradient; None for any.
    """

    name: str
    stand_in: str
    model: Literal["resnet18-small", "resnet18", "lstm"]
    unit: Literal["% error", "perplexity"]
    batch_size: int
    rate: float
    momentum: float
    weight_decay: float
    decoupled_decay: float
    drop_factor: float
    samples: int
    steps_per_epoch: int
    published: Scale
    reduced: Scale
    bptt: int = 0
    clip: float | None = None

    def samples_in(self, samples: int, steps_per_epoch: int) -> int:
        """As many epochs' worth of samples as ``samples`` are in the published run."""
        share = min(1.0, steps_per_epoch / self.steps_per_epoch)
        return max(min(samples, _FEWEST_SAMPLES), round(share * samples))

    def hand_tuned_rate(self, scale: Scale, validation: list[float]) -> float:
        """The rate of the next epoch, given the validation losses so far."""
        if scale.epochs_per_drop is not None:
            drops = len(validation) // scale.epochs_per_drop
        else:
            # As in the authors' code, an epoch that equals the best is none the better.
            pairs = enumerate(validation)
            drops = sum(i > 0 and x >= min(validation[:i]) for i, x in pairs)
        return self.rate / self.drop_factor**drops


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="cifar10",
            stand_in="fashion-mnist",
            model="resnet18-small",
            unit="% error",
            batch_size=128,
            rate=1.0,
            momentum=0.9,
            weight_decay=5e-4,
            decoupled_decay=0.1,
            drop_factor=10.0,
            samples=400,
            steps_per_epoch=390,
            published=Scale(epochs=300, epochs_per_drop=50, width=64),
            reduced=Scale(
                epochs=60,
                epochs_per_drop=10,
                width=4,
                num_train=6400,
                num_test=4000,
                image_size=14,
            ),
        ),
        Protocol(
            name="imagenet",
            stand_in="fashion-mnist",
            model="resnet18",
            unit="% error",
            batch_size=256,
            rate=1.0,
            momentum=0.9,
            weight_decay=1e-4,
            decoupled_decay=0.1,
            drop_factor=10.0,
            samples=1000,
            steps_per_epoch=5004,
            published=Scale(epochs=120, epochs_per_drop=30, width=64),
            reduced=Scale(
                epochs=48,
                epochs_per_drop=12,
                width=8,
                num_train=12_800,
                num_test=4000,
            ),
        ),
        Protocol(
            name="wikitext2",
            stand_in="linux-doc",
            model="lstm",
            unit="perplexity",
            batch_size=20,
            rate=20.0,
            momentum=0.0,
            weight_decay=0.0,
            decoupled_decay=0.0,
            drop_factor=4.0,
            samples=1000,
            steps_per_epoch=2983,
            published=Scale(epochs=40, epochs_per_drop=None, width=1500, dropout=0.65),
            reduced=Scale(
                epochs=30,
                epochs_per_drop=None,
                width=64,
                dropout=0.2,
                num_train=91_020,
            ),
            bptt=35,
            clip=0.25,
        ),
    )
}


def protocol_named(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise SystemExit(
            f"experiment must be one of {', '.join(PROTOCOLS)}, got {name!r}."
        )
    return PROTOCOLS[name]
