-- Which messages are open. A batch without gaps need not be read for it.
select
  pg_catalog.current_setting('pgonce_batch.partition')::pg_catalog.int4 as partition,
  case
    when pg_catalog.current_setting('pgonce_batch.has_gaps') operator(pg_catalog.=) 'false'
      and pg_catalog.current_setting('pgonce_batch.is_of_parked') operator(pg_catalog.=) 'false'
    then array(
      select pg_catalog.generate_series(
        pg_catalog.current_setting('pgonce_batch.first_offset')::pg_catalog.int8,
        pg_catalog.current_setting('pgonce_batch.last_offset')::pg_catalog.int8))
    else array(select r."offset" from pgonce.received r order by r."offset")
  end as offsets
