-- What the node has beside pgonce: its outputs, which are state of its inbox, so that checkpoints hold them.
--
-- The first lock is for several that start at once. The second is that of lock.sql: a node that runs has it when it comes
-- to the tables, and what is done to them below takes locks that it waits for, even where they are made already.
-- Index: the partial one serves commit and rollback, however many outputs there are.
do $$
begin
  perform pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('pgonce_node.outputs', 0));
  perform from pgonce.consumers c where c.consumer = 'node' for no key update;
end $$;
set local client_min_messages = warning;
create schema if not exists pgonce_node;
create table if not exists pgonce_node.outputs (
  "position" bigint generated always as identity primary key,
  event_id text collate "C" not null,
  word text collate "C" not null,
  count bigint not null,
  is_visible boolean not null default false
);
create table if not exists pgonce_node.turns (
  process uuid primary key,
  turn bigint not null,
  taken_at timestamptz not null default pg_catalog.now()
);
-- Somebody else's, made before, would run their code (triggers, defaults, casts) with the rights of this role.
do $$
declare
  stranger record;
begin
  select o.name, o.owner into stranger
  from (
    select pg_catalog.format('schema %s', n.oid::pg_catalog.regnamespace) as name, n.nspowner as owner
    from pg_catalog.pg_namespace n
    where n.oid = 'pgonce_node'::pg_catalog.regnamespace
    union all
    select pg_catalog.format('table %s', c.oid::pg_catalog.regclass), c.relowner
    from pg_catalog.pg_class c
    where c.oid in ('pgonce_node.outputs'::pg_catalog.regclass, 'pgonce_node.turns'::pg_catalog.regclass)
  ) o
  where o.owner <> (select r.oid from pg_catalog.pg_roles r where r.rolname = current_user)
    and o.owner <> (select c.relowner from pg_catalog.pg_class c where c.oid = 'pgonce.consumers'::pg_catalog.regclass)
  limit 1;
  if found then
    raise exception using errcode = 'insufficient_privilege',
      message = pg_catalog.format('%s belongs to %s', stranger.name, stranger.owner::pg_catalog.regrole),
      hint = 'It is to belong to this role, or to the owner of the schema of pgonce. Rename or drop it, or choose another --schema.';
  end if;
end $$;
create index if not exists outputs_staged on pgonce_node.outputs ("position") where not is_visible;
comment on table pgonce_node.outputs is 'What pgonce node has put out: staged until a commit makes it visible.';
comment on table pgonce_node.turns is 'The last batch of each process of pgonce node that has committed.';
delete from pgonce_node.turns where taken_at < pg_catalog.now() - interval '1 day';
