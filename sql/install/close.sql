-- Closes an installation: puts back what open.sql and expect_version.sql have set.
do $$
begin
  perform
    set_config('role', current_setting('pgonce_install.role'), true),
    set_config('lock_timeout', current_setting('pgonce_install.lock_timeout'), true),
    set_config('idle_in_transaction_session_timeout', current_setting('pgonce_install.silence'), true),
    set_config('client_min_messages', current_setting('pgonce_install.client_min_messages'), true),
    set_config('search_path', current_setting('pgonce_install.search_path'), true);
end $$;
