select pg_catalog.has_function_privilege('pgonce.restore_sequence()', 'execute') as may
