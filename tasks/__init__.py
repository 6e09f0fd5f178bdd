"""What a message makes happen. Tasks are `shared_task`s and import no Celery app."""
