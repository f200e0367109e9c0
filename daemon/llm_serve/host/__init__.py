"""The machine: processes, systemd, logs, files. Nothing here knows about requests or engines."""
