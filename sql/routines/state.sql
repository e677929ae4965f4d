-- State: the rows that a consumer's checkpoints hold beside its offsets, and how a row becomes text and comes back.
--
-- A consumer's state is what it has parked and given up, for an inbox what it has processed, and the rows of the tables that
-- its effects are in: word_counts, and what set_state names. All of it is saved, compared and restored by the same statements: a
-- relation and a condition for the rows that belong to the consumer. A row is saved as the text that PostgreSQL
-- makes of it, since jsonb would change some types; the settings that this text depends on are the same in all three, so it
-- reads back as it was.
--
-- A restored row is written by the owner of this schema. So a table that runs code of others when it is written (triggers,
-- rules), or that cannot be put back row by row, is refused.
--
-- Locks: none of its own. Indexes: the primary keys of the tables themselves.

create or replace function pgonce.key_columns(relation regclass)
returns name[]
language plpgsql stable
as $$
begin
  return array(
    select a.attname
    from pg_index i
    cross join lateral unnest(i.indkey::smallint[]) with ordinality k(attnum, nth)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where i.indrelid = key_columns.relation and i.indisprimary and k.nth <= i.indnkeyatts
    order by k.nth);
end $$;
comment on function pgonce.key_columns is 'Internal: the columns of a table''s primary key.';

create or replace function pgonce.is_shared(relation regclass)
returns boolean
language plpgsql stable
as $$
begin
  return exists (
    select from pg_attribute a
    join pg_type t on t.oid = a.atttypid
    where a.attrelid = is_shared.relation and a.attname = (pgonce.key_columns(relation))[1]
      and a.attname = 'consumer' and t.typcategory = 'S');
end $$;
comment on function pgonce.is_shared is 'Internal: whether several consumers may share a table of state, as its primary key begins with their name.';

create or replace function pgonce.signature(relation regclass)
returns text[]
language plpgsql stable
set quote_all_identifiers = off
as $$
begin
  return array(
    select format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod))
    from pg_attribute a
    where a.attrelid = signature.relation and a.attnum > 0 and not a.attisdropped
    order by a.attnum) || format('primary key %s', pgonce.key_columns(relation));
end $$;
comment on function pgonce.signature is 'Internal: the columns of a table and their types. The text of a row fits no others.';

create or replace function pgonce.check_state_table(relation regclass)
returns void
language plpgsql stable
as $$
declare
  home constant oid := (select w.relnamespace from pg_class w where w.oid = 'pgonce.word_counts'::regclass);
  fault text;
begin
  select case
    when c.relkind <> 'r' then 'is not an ordinary table'
    when c.relpersistence <> 'p' then 'is unlogged or temporary: a crash would empty it'
    when n.nspname = 'pg_catalog' or n.nspname = 'information_schema' then 'is a system table'
    when c.relnamespace = home then 'belongs to pgonce'
    when c.relrowsecurity then 'has row security'
    when cardinality(pgonce.key_columns(relation)) = 0 then 'has no primary key'
    when exists (select from pg_inherits i where relation in (i.inhparent, i.inhrelid)) then 'inherits, or is inherited from'
    when exists (select from pg_trigger t where t.tgrelid = relation and not t.tgisinternal) then 'has triggers'
    when exists (select from pg_rewrite r where r.ev_class = relation) then 'has rules'
    when exists (
      select from pg_constraint k
      where k.confrelid = relation and k.contype = 'f' and (k.confdeltype <> 'a' or not k.condeferrable)) then
      'is referenced by a foreign key that acts ON DELETE or is not deferrable'
    end
  into fault
  from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
  where c.oid = relation;
  if not found then
    fault := 'was dropped, or is null: name the others by set_state';
  end if;
  if fault is not null then
    raise exception using errcode = 'PO003', message = format('state table %s %s', relation, fault),
      hint = 'A state table is an ordinary table with a primary key, without triggers, rules and row security; a foreign key that refers to it is DEFERRABLE and does not act ON DELETE: its rows are put back one by one.';
  end if;
end $$;
comment on function pgonce.check_state_table is 'Internal: raises PO003 where the rows of a table cannot be put back.';

create or replace function pgonce.set_state(consumer text, tables regclass[])
returns setof pgonce.state_tables
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
  state regclass;
begin
  perform from pgonce.consumers c where c.consumer_id = reader.consumer_id for no key update;
  if not found then
    -- Dropped while we waited: say so.
    reader := pgonce.consumer_row(consumer);
  end if;
  foreach state in array coalesce(tables, '{}') loop
    perform pgonce.check_state_table(state);
    if not pgonce.is_shared(state) and exists (
      select from pgonce.state_tables s where s.relation = state and s.consumer_id <> reader.consumer_id) then
      raise exception using errcode = 'PO003', message = format('state table %s is that of another consumer', state),
        hint = 'Several consumers may share a table whose primary key begins with a column named consumer, of type text, which holds their names.';
    end if;
  end loop;
  delete from pgonce.state_tables s where s.consumer_id = reader.consumer_id and s.relation <> all (coalesce(tables, '{}'));
  insert into pgonce.state_tables (consumer_id, relation)
  select distinct reader.consumer_id, t from unnest(tables) t
  on conflict do nothing;
  return query select s.* from pgonce.state_tables s where s.consumer_id = reader.consumer_id order by s.relation;
end $$;
comment on function pgonce.set_state is 'Says which tables hold the effects of a consumer: its checkpoints save their rows, and a restore writes them, both with the rights of the owner of this schema; so grant it to nobody else, and name no table that somebody may alter whom you do not trust. Only this consumer may write them. Of a table whose primary key begins with a column named consumer, its rows are those that bear its name, and several may share it. The rows of word_counts are always state. Tables that were named before and are not now are state no more. Errors: PO002, PO003 (a table that cannot be put back: no primary key, triggers, rules, row security, inheritance, or a foreign key to it that acts ON DELETE or is not deferrable; or a table of another consumer).';

create or replace function pgonce.state_of(reader pgonce.consumers)
returns table (relation regclass, condition text)
language plpgsql stable
as $$
begin
  return query
    select s.relation,
           case when pgonce.is_shared(s.relation) then format('t.consumer::text collate "C" = %L', reader.consumer) else 'true' end
    from (
      select t.relation from pgonce.state_tables t where t.consumer_id = reader.consumer_id
      union all
      select 'pgonce.word_counts'::regclass) s
    union all
    select 'pgonce.parked'::regclass, format('t.consumer_id = %s and t.taken_by is null', reader.consumer_id)
    union all
    select 'pgonce.dead_letters'::regclass, format('t.consumer_id = %s', reader.consumer_id)
    union all
    select 'pgonce.processed_ids'::regclass, format('t.consumer_id = %s', reader.consumer_id)
    where reader.topic_id is null;
end $$;
comment on function pgonce.state_of is 'Internal: the relations that a consumer''s checkpoints save, and the rows of each.';
