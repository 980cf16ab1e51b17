"""What Alembic runs: the steps, on the connection that it is given, in the transaction it is in."""

from alembic import context

from allocator.service.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
