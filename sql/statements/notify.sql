select pg_catalog.pg_notify('pgonce.watch', '')
