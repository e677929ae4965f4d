set local search_path = pg_catalog, pg_temp; set local client_min_messages = warning
