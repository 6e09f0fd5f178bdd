"""The processes: `celery -A workers worker --gpu 0`, and `python -m workers.sweeper`."""
