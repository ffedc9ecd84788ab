"""The chronicle: logbook, report and MLflow mirror, all drawn from the journal and the telemetry."""
