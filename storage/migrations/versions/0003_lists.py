"""Lists of jobs by their state."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_index('ix_jobs_list_by_state', 'jobs', ['tenant_id', 'state', 'id'], unique=False)


def downgrade() -> None:
    op.drop_index('ix_jobs_list_by_state', table_name='jobs')
