"""What a trainer, a node and the supervisor agree on. Standard library only, so that any trainer can import it.

``exit_codes``, ``signals``, ``environment``, ``learning_rate`` and ``skip_windows`` are how a rank is started, steered
and ended. ``telemetry`` and ``phases`` are what it reports. ``manifest``, ``files`` and ``fence`` are how it saves.
"""
