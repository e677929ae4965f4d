-- What the node has beside pgonce: its outputs, which are state of its inbox, so that checkpoints hold them.
--
-- The lock is for several that start at once. Index: the partial one serves commit and rollback, however many outputs there are.
do $$
begin
  perform pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('pgonce_node.outputs', 0));
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
create index if not exists outputs_staged on pgonce_node.outputs ("position") where not is_visible;
comment on table pgonce_node.outputs is 'What pgonce node has put out: staged until a commit makes it visible.';
create table if not exists pgonce_node.turns (
  process uuid primary key,
  turn bigint not null,
  taken_at timestamptz not null default pg_catalog.now()
);
comment on table pgonce_node.turns is 'The last batch of each process of pgonce node that has committed.';
delete from pgonce_node.turns where taken_at < pg_catalog.now() - interval '1 day';
