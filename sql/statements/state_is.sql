-- Whether the tables of a consumer's state are these: for a role that may not name them.
select not exists (
  select
  from (select distinct t::pg_catalog.regclass as relation from pg_catalog.unnest($2::text[]) t) w
  full join (
    select s.relation from pgonce.state_tables s join pgonce.consumers c using (consumer_id) where c.consumer = $1) s
    on s.relation operator(pg_catalog.=) w.relation
  where w.relation is null or s.relation is null) as is_so
