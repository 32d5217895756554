"""ClipFusionVAD: CLIP-based weakly supervised video anomaly detection."""

from clipfusionvad.engine.checkpoint import load_weights
from clipfusionvad.models import create_model

__version__ = "0.1.0"
__all__ = ["create_model", "load_weights"]
