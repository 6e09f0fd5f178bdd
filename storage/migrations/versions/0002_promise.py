"""Dead letters and retention, idempotency keys, webhooks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table('idempotency_keys',
    sa.Column('tenant_id', sa.UUID(), nullable=False),
    sa.Column('route', sa.Text(), nullable=False),
    sa.Column('key', sa.Text(), nullable=False),
    sa.Column('fingerprint', sa.LargeBinary(), nullable=False),
    sa.Column('resource_id', sa.UUID(), nullable=False),
    sa.Column('answer', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_idempotency_keys_tenant_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('tenant_id', 'route', 'key', name=op.f('pk_idempotency_keys'))
    )
    op.create_index('ix_idempotency_keys_created_at', 'idempotency_keys', ['created_at'], unique=False)
    op.create_table('webhooks',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('tenant_id', sa.UUID(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('url', sa.Text(), nullable=False),
    sa.Column('events', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('generation', sa.Integer(), server_default=sa.text('1'), nullable=False),
    sa.Column('previous_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('disabled_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('disabled_why', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_webhooks_tenant_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_webhooks'))
    )
    op.create_index('ix_webhooks_tenant', 'webhooks', ['tenant_id', 'id'], unique=False)
    op.create_table('deliveries',
    sa.Column('id', sa.UUID(), nullable=False),
    sa.Column('webhook_id', sa.UUID(), nullable=False),
    sa.Column('tenant_id', sa.UUID(), nullable=False),
    sa.Column('event', sa.Text(), nullable=False),
    sa.Column('job_id', sa.UUID(), nullable=True),
    sa.Column('payload', postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('attempts', sa.Integer(), server_default=sa.text('0'), nullable=False),
    sa.Column('lease_token', sa.BigInteger(), server_default=sa.text('0'), nullable=False),
    sa.Column('error', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('not_before', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_deliveries_tenant_id'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['webhook_id'], ['webhooks.id'], name=op.f('fk_deliveries_webhook_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_deliveries'))
    )
    op.create_index('ix_deliveries_due', 'deliveries', ['webhook_id', 'not_before'], unique=False, postgresql_where=sa.text("state = 'pending'"))
    op.create_index('ix_deliveries_flying', 'deliveries', ['webhook_id'], unique=False, postgresql_where=sa.text("lease_until IS NOT NULL"))
    op.create_index('ix_deliveries_webhook', 'deliveries', ['webhook_id', 'id'], unique=False)
    op.create_table('delivery_attempts',
    sa.Column('delivery_id', sa.UUID(), nullable=False),
    sa.Column('attempt', sa.Integer(), nullable=False),
    sa.Column('status', sa.Integer(), nullable=True),
    sa.Column('error', sa.Text(), nullable=True),
    sa.Column('response', sa.Text(), nullable=True),
    sa.Column('duration_ms', sa.Integer(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['delivery_id'], ['deliveries.id'], name=op.f('fk_delivery_attempts_delivery_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('delivery_id', 'attempt', name=op.f('pk_delivery_attempts'))
    )
    op.add_column('chunks', sa.Column('hints', sa.SmallInteger(), server_default=sa.text('0'), nullable=False))
    op.add_column('chunks', sa.Column('redriven_as', sa.UUID(), nullable=True))
    op.create_index('ix_chunks_dead', 'chunks', ['tenant_id', 'id'], unique=False, postgresql_where=sa.text("state = 'dead'"))
    op.add_column('files', sa.Column('purged_at', sa.DateTime(timezone=True), nullable=True))
    op.create_index('ix_files_expiry', 'files', ['expires_at'], unique=False, postgresql_where=sa.text('purged_at IS NULL'))
    op.add_column('jobs', sa.Column('purged_at', sa.DateTime(timezone=True), nullable=True))
    op.add_column('jobs', sa.Column('redrive_of', sa.UUID(), nullable=True))
    op.create_table('walks',
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('after', sa.Text(), server_default=sa.text("''"), nullable=False),
    sa.Column('owner', sa.UUID(), server_default=sa.text('gen_random_uuid()'), nullable=False),
    sa.Column('lease_token', sa.BigInteger(), nullable=False),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_walks'))
    )
    op.create_index('ix_files_deleted', 'files', ['id'], unique=False, postgresql_where=sa.text('purged_at IS NULL AND deleted_at IS NOT NULL'))
    op.create_index('ix_files_purged', 'files', ['purged_at'], unique=False, postgresql_where=sa.text('purged_at IS NOT NULL'))
    op.create_index('ix_files_object_key', 'files', ['object_key'], unique=False, postgresql_where=sa.text('purged_at IS NULL'))
    op.create_index('ix_batches_input_file_id', 'batches', ['input_file_id'], unique=False)
    op.create_index('ix_batches_output_file_id', 'batches', ['output_file_id'], unique=False)
    op.create_index('ix_batches_error_file_id', 'batches', ['error_file_id'], unique=False)
    op.create_index('ix_jobs_input_key', 'jobs', ['input_key'], unique=False, postgresql_where=sa.text('input_key IS NOT NULL'))
    op.create_index('ix_jobs_unpurged', 'jobs', ['finished_at'], unique=False, postgresql_where=sa.text('finished_at IS NOT NULL AND purged_at IS NULL'))
    op.create_index('ix_jobs_finished', 'jobs', ['finished_at'], unique=False, postgresql_where=sa.text('finished_at IS NOT NULL'))


def downgrade() -> None:
    op.drop_index('ix_jobs_input_key', table_name='jobs', postgresql_where=sa.text('input_key IS NOT NULL'))
    op.drop_index('ix_jobs_unpurged', table_name='jobs', postgresql_where=sa.text('finished_at IS NOT NULL AND purged_at IS NULL'))
    op.drop_index('ix_batches_error_file_id', table_name='batches')
    op.drop_index('ix_batches_output_file_id', table_name='batches')
    op.drop_index('ix_batches_input_file_id', table_name='batches')
    op.drop_index('ix_files_object_key', table_name='files', postgresql_where=sa.text('purged_at IS NULL'))
    op.drop_index('ix_files_purged', table_name='files', postgresql_where=sa.text('purged_at IS NOT NULL'))
    op.drop_index('ix_files_deleted', table_name='files', postgresql_where=sa.text('purged_at IS NULL AND deleted_at IS NOT NULL'))
    op.drop_table('walks')
    op.drop_index('ix_jobs_finished', table_name='jobs', postgresql_where=sa.text('finished_at IS NOT NULL'))
    op.drop_column('jobs', 'redrive_of')
    op.drop_column('jobs', 'purged_at')
    op.drop_index('ix_files_expiry', table_name='files', postgresql_where=sa.text('purged_at IS NULL'))
    op.drop_column('files', 'purged_at')
    op.drop_index('ix_chunks_dead', table_name='chunks', postgresql_where=sa.text("state = 'dead'"))
    op.drop_column('chunks', 'redriven_as')
    op.drop_column('chunks', 'hints')
    op.drop_table('delivery_attempts')
    op.drop_index('ix_deliveries_webhook', table_name='deliveries')
    op.drop_index('ix_deliveries_flying', table_name='deliveries', postgresql_where=sa.text("lease_until IS NOT NULL"))
    op.drop_index('ix_deliveries_due', table_name='deliveries', postgresql_where=sa.text("state = 'pending'"))
    op.drop_table('deliveries')
    op.drop_index('ix_webhooks_tenant', table_name='webhooks')
    op.drop_table('webhooks')
    op.drop_index('ix_idempotency_keys_created_at', table_name='idempotency_keys')
    op.drop_table('idempotency_keys')
