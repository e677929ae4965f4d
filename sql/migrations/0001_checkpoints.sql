-- Checkpoints ------------------------------------------------------------------------------------------------------

create table pgonce.queue_floors (
  topic_id integer not null,
  partition integer not null,
  floor bigint not null default 1 check (floor >= 1),
  primary key (topic_id, partition)
) with (fillfactor = 50);
comment on table pgonce.queue_floors is 'What is left of each partition of the queue. Whoever deletes messages raises the floor in the same transaction; whoever counts on messages that are not received yet (create_consumer, checkpoint, restore, replay) holds it FOR SHARE.';
comment on column pgonce.queue_floors.topic_id is 'The topic.';
comment on column pgonce.queue_floors.partition is 'The partition.';
comment on column pgonce.queue_floors.floor is 'The messages below this offset may have been deleted.';

create table pgonce.state_tables (
  consumer_id integer not null references pgonce.consumers,
  relation regclass not null,
  primary key (consumer_id, relation)
);
comment on table pgonce.state_tables is 'The tables that hold the effects of a consumer, as set_state was told.';
comment on column pgonce.state_tables.consumer_id is 'The consumer.';
comment on column pgonce.state_tables.relation is 'The table.';

create table pgonce.checkpoints (
  checkpoint_id bigint generated always as identity primary key,
  taken_at timestamptz not null default clock_timestamp(),
  row_count bigint not null default 0 check (row_count >= 0),
  consumer_id integer not null references pgonce.consumers,
  is_scheduled boolean not null default false,
  checkpoint text collate "C" not null check (octet_length(checkpoint) between 1 and 255),
  taken_by name not null default session_user,
  unique (consumer_id, checkpoint)
);
comment on table pgonce.checkpoints is 'Snapshots of consumers: each is of one moment, between two of the consumer''s transactions in every partition.';
comment on column pgonce.checkpoints.checkpoint_id is 'Names it in the other tables.';
comment on column pgonce.checkpoints.taken_at is 'When it was taken.';
comment on column pgonce.checkpoints.row_count is 'Rows that it holds.';
comment on column pgonce.checkpoints.consumer_id is 'The consumer.';
comment on column pgonce.checkpoints.is_scheduled is 'Whether a worker has taken it by itself: of these only some are kept.';
comment on column pgonce.checkpoints.checkpoint is 'Its name, 1 to 255 bytes.';
comment on column pgonce.checkpoints.taken_by is 'The role that has taken it.';

create table pgonce.checkpoint_offsets (
  checkpoint_id bigint not null,
  partition integer not null,
  next_offset bigint not null,
  received bigint not null,
  duplicates bigint not null,
  failures bigint not null,
  dead bigint not null,
  primary key (checkpoint_id, partition)
);
comment on table pgonce.checkpoint_offsets is 'How far the consumer had come in each partition at a checkpoint: as in progress.';
comment on column pgonce.checkpoint_offsets.checkpoint_id is 'The checkpoint.';
comment on column pgonce.checkpoint_offsets.partition is 'The partition.';
comment on column pgonce.checkpoint_offsets.next_offset is 'Offset of the next message to receive.';
comment on column pgonce.checkpoint_offsets.received is 'Messages received until then, without duplicates.';
comment on column pgonce.checkpoint_offsets.duplicates is 'Messages left out until then.';
comment on column pgonce.checkpoint_offsets.failures is 'Attempts that had failed.';
comment on column pgonce.checkpoint_offsets.dead is 'Messages that had become dead letters.';

create table pgonce.checkpoint_tables (
  checkpoint_id bigint not null,
  relation regclass not null,
  columns text[] not null,
  primary key (checkpoint_id, relation)
);
comment on table pgonce.checkpoint_tables is 'The tables whose rows a checkpoint holds, also where there were none.';
comment on column pgonce.checkpoint_tables.checkpoint_id is 'The checkpoint.';
comment on column pgonce.checkpoint_tables.relation is 'The table.';
comment on column pgonce.checkpoint_tables.columns is 'Its columns and their types then: the text of a row fits no others.';

create table pgonce.checkpoint_parts (
  checkpoint_id bigint not null,
  relation regclass not null,
  rows text[] collate "C" not null
);
create index checkpoint_parts_relation on pgonce.checkpoint_parts (checkpoint_id, relation);
comment on table pgonce.checkpoint_parts is 'The rows that a checkpoint holds, many of them together, as this compresses well: the consumer''s state, what it had parked and given up, and for an inbox what it had processed. The view checkpoint_rows shows them one by one.';
comment on column pgonce.checkpoint_parts.checkpoint_id is 'The checkpoint.';
comment on column pgonce.checkpoint_parts.relation is 'The table that the rows are of.';
comment on column pgonce.checkpoint_parts.rows is 'Rows, each as text.';
