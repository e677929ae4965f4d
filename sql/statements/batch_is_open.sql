-- Fails in a transaction that was aborted; answers false or null in one that is not the one that received.
select pg_catalog.current_setting('pgonce_batch.is_open', true) operator(pg_catalog.=) 'true' as is_open
