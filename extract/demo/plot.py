"""One picture of a training run."""

from collections.abc import Sequence
from pathlib import Path

from extract.demo.sae import Metrics


def plot_loss(history: Sequence[Metrics], path: Path) -> None:
    """Draws error and dead features over the training steps, as a PNG file at `path`.

    Draws on a figure of its own: neither matplotlib's global state nor a display is touched.

    Args:
        history: The metrics after each step, as `TrainedSAE.history` holds them.
        path: The file; overwritten.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    steps = range(1, len(history) + 1)
    figure = Figure(figsize=(7.0, 5.5), dpi=150, layout="constrained")
    error, dead = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    error.plot(steps, [metrics.fvu for metrics in history], label="fraction of variance unexplained")
    error.plot(steps, [metrics.loss for metrics in history], label="squared error / mean squared norm")
    error.set(ylabel="error (1 = mean row, or zeros)", title="TopK sparse autoencoder")
    error.set_ylim(bottom=0.0)
    error.legend()
    dead.plot(steps, [metrics.dead for metrics in history], color="tab:red")
    dead.set(xlabel="step (batches)", ylabel="dead features")
    dead.set_ylim(0.0, max(0.01, 1.1 * max(metrics.dead for metrics in history)))
    dead.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    for axes in (error, dead):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")
