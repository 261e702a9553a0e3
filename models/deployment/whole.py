"""A detector as it is in a graph for export, where nothing of it has to be written anew."""

from torch import Tensor, nn

from models.detector import Detector, Scored


class Whole(nn.Module):
    """Scores as the detector does; for one that is traced as it stands."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, given: Tensor) -> Tensor | Scored:
        """Return maps, and the method's own image scores where it has them."""
        maps, scores = self.detector.score(given)
        return maps if scores is None else (maps, scores)
