select consumer_id from pgonce.set_state($1, $2::text[]::pg_catalog.regclass[])
