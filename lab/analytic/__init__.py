"""The analytic side: predict(RunConfig) -> Prediction. Pure arithmetic, no torch below here."""

from lab.analytic.predict import predict

__all__ = ["predict"]
