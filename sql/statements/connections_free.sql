-- How many connections the server has for those who have none reserved, and how many of them are free.
with server as (
  select
    pg_catalog.current_setting('max_connections')::bigint
      - pg_catalog.current_setting('superuser_reserved_connections')::bigint
      - coalesce(pg_catalog.current_setting('reserved_connections', true)::bigint, 0) as most,
    -- Of the sessions of other roles everybody sees that they are in a database, and no more.
    (select count(*) from pg_catalog.pg_stat_activity where datid is not null) as used
)
select most, greatest(most - used, 0) as free from server
