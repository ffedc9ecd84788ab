"""The chronicle in MLflow: what is shown, and how it is kept up to date."""
