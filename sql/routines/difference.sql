-- Difference: what a restore would change, without changing anything.
--
-- All of it is read in one snapshot, that of the statement that calls it. Locks: none.

create or replace function pgonce.table_difference(
  checkpoint_id bigint, relation regclass, condition text, samples integer)
returns pgonce.difference
language plpgsql stable
set row_security = off
set datestyle = 'ISO, YMD'
set intervalstyle = 'postgres'
set timezone = 'UTC'
set extra_float_digits = 3
set bytea_output = 'hex'
set lc_monetary = 'C'
set array_nulls = on
set xmloption = content
as $$
declare
  answer pgonce.difference;
  key text;
begin
  select string_agg(format('(r.v).%I', k.name), ', ' order by k.nth) into key
  from unnest(pgonce.key_columns(relation)) with ordinality k(name, nth);
  execute format(
    $sql$
      with compared as (
        select saved.row as saved, present.row as present
        from (
          select r.saved as row from pgonce.checkpoint_parts p
          cross join lateral unnest(p.rows) r(saved)
          where p.checkpoint_id = $1 and p.relation = %1$L::regclass) saved
        full join (select (t.*)::text as row from %1$s t where %2$s) present on present.row = saved.row
        where saved.row is null or present.row is null),
      -- `offset 0`: the text is read once, and not for each column.
      keyed as (
        select row(%3$s)::text as key, r.is_saved
        from (
          select c.saved::%1$s as v, true as is_saved from compared c where c.saved is not null
          union all
          select c.present::%1$s, false from compared c where c.present is not null
          offset 0) r),
      changed as (
        select case when bool_and(k.is_saved) then 'removed' when bool_or(k.is_saved) then 'changed' else 'added' end as change, k.key
        from keyed k
        group by k.key)
      select 'table', $2, null,
             count(*) filter (where c.change = 'added'),
             count(*) filter (where c.change = 'removed'),
             count(*) filter (where c.change = 'changed'),
             array(
               select n.change || ' ' || n.key
               from (select m.*, row_number() over (partition by m.change order by m.key) as nth from changed m) n
               where n.nth <= $3
               order by n.change, n.nth)
      from changed c
    $sql$, relation, condition, key)
  into answer
  using checkpoint_id, relation::text, samples;
  return answer;
end $$;
comment on function pgonce.table_difference is 'Internal: how the rows of a table that belong to a consumer differ from those of a checkpoint.';

create or replace function pgonce.checkpoint_difference(consumer text, checkpoint text, samples integer default 5)
returns setof pgonce.difference
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
  taken pgonce.checkpoints := pgonce.checkpoint_row(reader, checkpoint);
  state record;
begin
  if samples is null or samples not between 0 and 1000 then
    raise exception using errcode = 'PO003', message = format('samples of %s', samples),
      hint = '0 to 1000 keys can be shown of each kind of change.';
  end if;
  perform pgonce.check_restorable(reader, taken);
  return query
    select 'partition'::text, s.partition::text, greatest(o.next_offset - s.next_offset, 0),
           null::bigint, null::bigint, null::bigint, null::text[]
    from pgonce.checkpoint_offsets s
    join pgonce.consumer_offsets o on o.consumer_id = reader.consumer_id and o.partition = s.partition
    where s.checkpoint_id = taken.checkpoint_id
    order by s.partition;
  for state in select s.* from pgonce.state_of(reader) s loop
    return next pgonce.table_difference(taken.checkpoint_id, state.relation, state.condition, samples);
  end loop;
end $$;
comment on function pgonce.checkpoint_difference is 'What a restore would change: for each partition how many messages come again, and for each table of the consumer how many rows were added, removed and changed since, with the keys of up to so many of each kind. Changes nothing. Errors: PO002, PO003, PO006 (its tables are others now), PO014 (messages that a restore needs are gone), PO015 (no such checkpoint).';
