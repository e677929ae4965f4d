-- Names without a schema are PostgreSQL's own. The wait for a lock is bounded: whoever uses a view would queue behind it.
set local search_path = pg_catalog, pg_temp; set local client_min_messages = warning; set local lock_timeout = '30s'
