"""Batches over arrays."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column('batches', sa.Column('arrays', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True))
    op.add_column('batches', sa.Column('layout', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True))
    op.add_column('batches', sa.Column('staged_key', sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column('batches', 'staged_key')
    op.drop_column('batches', 'layout')
    op.drop_column('batches', 'arrays')
