select exists (select from pg_catalog.pg_namespace n where n.nspname = $1) as schema_exists
