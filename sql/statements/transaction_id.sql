select pg_catalog.pg_current_xact_id()::text as transaction_id
