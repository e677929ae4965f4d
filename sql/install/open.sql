-- Opens an installation: its settings, for this transaction only, and the lock by which installations of one schema wait
-- for each other.
--
-- Names without a schema are PostgreSQL's own. The wait for a lock is bounded: whoever uses a view would queue behind it. So
-- is the silence of an installation that was stopped, behind which all others wait.
-- close.sql puts everything back: a tool that runs the printed text has statements of its own in the same transaction.
do $$
begin
  perform
    pg_catalog.set_config('pgonce_install.role', pg_catalog.current_setting('role'), true),
    pg_catalog.set_config('pgonce_install.search_path', pg_catalog.current_setting('search_path'), true),
    pg_catalog.set_config('pgonce_install.lock_timeout', pg_catalog.current_setting('lock_timeout'), true),
    pg_catalog.set_config(
      'pgonce_install.silence', pg_catalog.current_setting('idle_in_transaction_session_timeout'), true),
    pg_catalog.set_config('pgonce_install.client_min_messages', pg_catalog.current_setting('client_min_messages'), true);
  perform
    pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
    pg_catalog.set_config('lock_timeout', '30s', true),
    pg_catalog.set_config('idle_in_transaction_session_timeout', '30s', true),
    pg_catalog.set_config('client_min_messages', 'warning', true);
  perform pg_advisory_xact_lock(hashtextextended('pgonce.schema_versions', 0));
end $$;
