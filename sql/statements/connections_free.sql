-- How many connections the server has for those who are no superusers, and how many of them are free.
with server as (
  select
    pg_catalog.current_setting('max_connections')::bigint
      - pg_catalog.current_setting('superuser_reserved_connections')::bigint as most,
    (select count(*) from pg_catalog.pg_stat_activity where backend_type = 'client backend') as used
)
select most, greatest(most - used, 0) as free from server
