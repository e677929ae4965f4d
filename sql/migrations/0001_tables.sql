-- The tables of pgonce, version 1.
--
-- Two rows are locks and nothing else: a row of `partitions` (the head lock: whoever holds it may append to that
-- partition of the queue) and a row of `consumer_partitions` (the offset lock: whoever holds it may change what a
-- consumer has made of that partition). They are hardly ever updated, and no foreign key points at them, because the
-- check of a foreign key would lock them for as long as a producer's transaction is open. What changes with every
-- batch (`heads`, `progress`) is appended as a new generation: a row that is updated with every batch grows a chain of
-- dead versions as long as any session holds an old snapshot.
--
-- `pgonce` stands here for the name that the schema is given when it is installed.

create table pgonce.schema_versions (
  version integer primary key check (version > 0),
  program text not null,
  routines_digest text not null,
  routines text[] not null,
  installed_at timestamptz not null default clock_timestamp()
);
comment on table pgonce.schema_versions is 'One row for each version of this schema that was installed here; the highest is in force.';
comment on column pgonce.schema_versions.version is 'Version of the tables; rises by one with each migration.';
comment on column pgonce.schema_versions.program is 'Version of the pgonce program or library that installed it.';
comment on column pgonce.schema_versions.routines_digest is 'SHA-256 of the functions and views in force, in hex: a program with others installs its own.';
comment on column pgonce.schema_versions.routines is 'Names of these functions and views: what an upgrade replaces or drops.';
comment on column pgonce.schema_versions.installed_at is 'When it was installed, or its functions were last replaced.';

-- Topics and the outbox ------------------------------------------------------------------------------------------

create table pgonce.topics (
  topic_id integer generated always as identity primary key,
  topic text collate "C" not null unique check (octet_length(topic) between 1 and 255),
  partitions integer not null check (partitions between 1 and 1024),
  payload_bytes_max integer not null check (payload_bytes_max between 1 and 67108864),
  paused boolean not null default false,
  created_at timestamptz not null default clock_timestamp()
);
comment on table pgonce.topics is 'Streams of messages. A topic has a fixed number of partitions, and each key belongs to one of them.';
comment on column pgonce.topics.topic_id is 'Short name of the topic in the other tables; never used again after a drop.';
comment on column pgonce.topics.topic is 'Name, 1 to 255 bytes.';
comment on column pgonce.topics.partitions is 'Number of partitions, 1 to 1024; cannot change, because it decides where a key belongs.';
comment on column pgonce.topics.payload_bytes_max is 'Largest payload in bytes of its binary JSON form, up to 64 MiB.';
comment on column pgonce.topics.paused is 'While true, the relay leaves the topic alone; messages can be enqueued all the same.';
comment on column pgonce.topics.created_at is 'When the topic was created.';

create table pgonce.partitions (
  topic_id integer not null references pgonce.topics,
  partition integer not null check (partition >= 0),
  primary key (topic_id, partition)
);
comment on table pgonce.partitions is 'The head locks: whoever holds a row FOR NO KEY UPDATE may append to that partition of the queue.';
comment on column pgonce.partitions.topic_id is 'The topic.';
comment on column pgonce.partitions.partition is 'Number of the partition, from 0.';

create sequence pgonce.outbox_seq cache 1;
comment on sequence pgonce.outbox_seq is 'Order of the outbox. CACHE must stay 1: the relay needs numbers to be drawn in the order in which they are given.';

create sequence pgonce.looks cycle cache 1000;
comment on sequence pgonce.looks is 'How many rows statements have looked at, where messages fail (see the view received). A sequence, because no rollback takes it back.';

create sequence pgonce.watched_until minvalue 0 start 0 cache 1;
comment on sequence pgonce.watched_until is 'Until when, in milliseconds since 1970, a program that sleeps wants to be notified of new messages. A sequence, because it is shared by all at once and leaves no dead rows. It decides who wakes up when, and nothing else.';

create table pgonce.outbox (
  seq bigint not null
    default nextval(case when pg_current_xact_id() is not null then 'pgonce.outbox_seq'::regclass end),
  enqueued_at timestamptz not null default clock_timestamp(),
  deliver_at timestamptz,
  topic_id integer not null,
  partition integer not null,
  bytes integer not null check (bytes between 1 and 67150000),
  status text collate "C" not null default 'PENDING' check (status in ('SCHEDULED', 'PENDING', 'SENT')),
  message_id text collate "C" not null check (octet_length(message_id) between 1 and 255),
  key text collate "C" check (octet_length(key) between 1 and 255),
  payload jsonb not null,
  headers jsonb check (jsonb_typeof(headers) = 'object' and pg_column_size(headers) <= 16384),
  primary key (topic_id, message_id),
  check ((status = 'SCHEDULED') = (deliver_at is not null))
) with (fillfactor = 47);
create index outbox_in_order on pgonce.outbox (topic_id, partition, seq);
create index outbox_scheduled on pgonce.outbox (topic_id, partition, deliver_at, seq) where deliver_at is not null;
comment on table pgonce.outbox is 'Messages as their transactions wrote them. A row stays after it was SENT: it is what a duplicate is recognised by. Half of each page is left free and status stands in no index, so that marking a row SENT stays on its page.';
comment on column pgonce.outbox.seq is 'Order of relaying. Drawn after the transaction has its xid, and drawn anew by whatever makes a row PENDING: the relay does not look again below a bound that rests on both.';
comment on column pgonce.outbox.enqueued_at is 'When it was enqueued, by the database''s clock. Orders nothing.';
comment on column pgonce.outbox.deliver_at is 'When a SCHEDULED message becomes due; null for all others.';
comment on column pgonce.outbox.topic_id is 'The topic.';
comment on column pgonce.outbox.partition is 'The partition that its key belongs to.';
comment on column pgonce.outbox.bytes is 'Size of payload and headers before compression.';
comment on column pgonce.outbox.status is 'SCHEDULED until deliver_at, then PENDING until it is in the queue, then SENT.';
comment on column pgonce.outbox.message_id is 'Names the message for good: a second message with this id is a duplicate. 1 to 255 bytes.';
comment on column pgonce.outbox.key is 'Messages of one key stay in order. 1 to 255 bytes; null where order does not matter.';
comment on column pgonce.outbox.payload is 'What the message says.';
comment on column pgonce.outbox.headers is 'What is said about the message: a JSON object up to 16 KiB.';

create table pgonce.duplicate_sends (
  sent_at timestamptz not null default clock_timestamp(),
  messages bigint not null default 1 check (messages > 0),
  topic_id integer not null,
  message_id text collate "C"
);
create index duplicate_sends_topic on pgonce.duplicate_sends (topic_id, sent_at) include (messages);
comment on table pgonce.duplicate_sends is 'One row for each message that enqueue refused because its id was known; those that are older than 10 minutes are added up (rates.sql). Counting them in the outbox row would lock it, and so hold back its key.';
comment on column pgonce.duplicate_sends.sent_at is 'When it was sent again.';
comment on column pgonce.duplicate_sends.messages is 'How many the row stands for.';
comment on column pgonce.duplicate_sends.topic_id is 'The topic.';
comment on column pgonce.duplicate_sends.message_id is 'The id that was sent again; null where the row stands for several.';

-- The queue --------------------------------------------------------------------------------------------------------

create table pgonce.heads (
  topic_id integer not null,
  partition integer not null,
  generation bigint not null check (generation >= 0),
  next_offset bigint not null check (next_offset >= 1),
  scanned bigint not null check (scanned >= 0),
  floor bigint not null,
  open_xids xid8[] not null,
  open_from bigint[] not null,
  candidate_seq bigint,
  candidate_xid xid8,
  moved bigint not null check (moved >= 0),
  primary key (topic_id, partition, generation),
  check (scanned <= floor),
  check (cardinality(open_xids) = cardinality(open_from)),
  check ((candidate_seq is null) = (candidate_xid is null))
);
comment on table pgonce.heads is 'How far each partition has been relayed. Appended by the holder of the head lock; the newest generation is in force (view partition_heads). The lower bound of the scan is explained in relay_bound.sql.';
comment on column pgonce.heads.topic_id is 'The topic.';
comment on column pgonce.heads.partition is 'The partition.';
comment on column pgonce.heads.generation is 'Rises by one with each change.';
comment on column pgonce.heads.next_offset is 'Offset of the next message that is appended; the first is 1.';
comment on column pgonce.heads.scanned is 'At or below this seq nothing is PENDING, except what the transactions in open_xids may still commit.';
comment on column pgonce.heads.floor is 'The candidate that was adopted last: a transaction that is met for the first time has no row at or below it.';
comment on column pgonce.heads.open_xids is 'Transactions that were open when scanned passed the rows they may hold.';
comment on column pgonce.heads.open_from is 'For each of open_xids, a seq below all its rows.';
comment on column pgonce.heads.candidate_seq is 'The highest seq drawn before candidate_xid was assigned.';
comment on column pgonce.heads.candidate_xid is 'Every transaction that draws a seq up to candidate_seq has a lower xid than this.';
comment on column pgonce.heads.moved is 'Messages moved from the outbox to the queue, ever.';

create table pgonce.queue (
  "offset" bigint not null,
  enqueued_at timestamptz not null,
  topic_id integer not null,
  partition integer not null,
  bytes integer not null,
  message_id text collate "C" not null,
  key text collate "C",
  payload jsonb not null,
  headers jsonb,
  primary key (topic_id, partition, "offset"),
  constraint queue_message_id_key unique (topic_id, message_id),
  check ("offset" >= 1)
);
comment on table pgonce.queue is 'Messages in their final order: gapless offsets in each partition.';
comment on column pgonce.queue."offset" is 'Place in the partition, from 1, without gaps. Never a key for deduplication: message_id is.';
comment on column pgonce.queue.enqueued_at is 'When it was enqueued.';
comment on column pgonce.queue.topic_id is 'The topic.';
comment on column pgonce.queue.partition is 'The partition.';
comment on column pgonce.queue.bytes is 'Size of payload and headers before compression.';
comment on column pgonce.queue.message_id is 'Names the message for good.';
comment on column pgonce.queue.key is 'Messages of one key stay in order.';
comment on column pgonce.queue.payload is 'What the message says.';
comment on column pgonce.queue.headers is 'What is said about the message.';

create table pgonce.set_aside (
  topic_id integer not null,
  partition integer not null,
  seq bigint not null,
  message_id text collate "C" not null,
  key text collate "C",
  payload jsonb not null,
  headers jsonb,
  reason text not null,
  set_aside_at timestamptz not null default clock_timestamp()
);
create index set_aside_topic on pgonce.set_aside (topic_id, set_aside_at);
comment on table pgonce.set_aside is 'Outbox rows that the relay could not publish because their id stands in the queue already. Only a row changed by hand, or a defect, comes here; the rest of the partition goes on.';
comment on column pgonce.set_aside.topic_id is 'The topic.';
comment on column pgonce.set_aside.partition is 'The partition.';
comment on column pgonce.set_aside.seq is 'Its seq in the outbox.';
comment on column pgonce.set_aside.message_id is 'Its id.';
comment on column pgonce.set_aside.key is 'Its key.';
comment on column pgonce.set_aside.payload is 'Its payload.';
comment on column pgonce.set_aside.headers is 'Its headers.';
comment on column pgonce.set_aside.reason is 'Why it was not published.';
comment on column pgonce.set_aside.set_aside_at is 'When it was set aside.';

-- Consumers --------------------------------------------------------------------------------------------------------

create table pgonce.consumers (
  consumer_id integer generated always as identity primary key,
  consumer text collate "C" not null unique check (octet_length(consumer) between 1 and 255),
  topic_id integer references pgonce.topics,
  paused boolean not null default false,
  kind text collate "C" not null default 'transactional' check (kind in ('transactional', 'external')),
  failure_policy text collate "C" not null default 'park_key' check (failure_policy in ('park_key', 'block', 'skip')),
  attempts_max integer not null default 10 check (attempts_max between 1 and 1000),
  backoff_min_ms integer not null default 500 check (backoff_min_ms between 1 and 86400000),
  backoff_max_ms integer not null default 30000 check (backoff_max_ms between backoff_min_ms and 86400000),
  delivery text collate "C" not null default 'exactly_once' check (delivery in ('exactly_once', 'at_least_once', 'at_most_once')),
  created_at timestamptz not null default clock_timestamp(),
  check (kind = 'transactional' or topic_id is not null)
);
comment on table pgonce.consumers is 'Named readers of a topic, and inboxes (consumers without a topic) for messages that come from elsewhere.';
comment on column pgonce.consumers.consumer_id is 'Short name of the consumer in the other tables; never used again after a drop.';
comment on column pgonce.consumers.consumer is 'Name, 1 to 255 bytes.';
comment on column pgonce.consumers.topic_id is 'The topic that it reads; null for an inbox.';
comment on column pgonce.consumers.paused is 'While true, receive returns nothing.';
comment on column pgonce.consumers.kind is 'Where its effect is: in this database, in one transaction with the offset (transactional), or elsewhere, under a lease (external).';
comment on column pgonce.consumers.failure_policy is 'What waits while a message that failed is tried again: it and the later ones of its key (park_key), its partition (block), or only the message itself (skip).';
comment on column pgonce.consumers.attempts_max is 'After so many failed attempts a message becomes a dead letter.';
comment on column pgonce.consumers.backoff_min_ms is 'Longest wait after the first failed attempt, in milliseconds; it doubles with each further one. The wait is random up to it.';
comment on column pgonce.consumers.backoff_max_ms is 'Longest wait after any failed attempt, in milliseconds.';
comment on column pgonce.consumers.delivery is 'How often the effect of a message happens where a process dies, as whoever runs it has said last (set_delivery). Means nothing where its effect is elsewhere.';
comment on column pgonce.consumers.created_at is 'When the consumer was created.';

create table pgonce.consumer_partitions (
  consumer_id integer not null references pgonce.consumers,
  partition integer not null check (partition >= 0),
  primary key (consumer_id, partition)
);
comment on table pgonce.consumer_partitions is 'The offset locks: whoever holds a row FOR NO KEY UPDATE may change what the consumer has made of that partition.';
comment on column pgonce.consumer_partitions.consumer_id is 'The consumer.';
comment on column pgonce.consumer_partitions.partition is 'The partition.';

create table pgonce.progress (
  consumer_id integer not null,
  partition integer not null,
  generation bigint not null check (generation >= 0),
  next_offset bigint not null check (next_offset >= 1),
  received bigint not null check (received >= 0),
  duplicates bigint not null check (duplicates >= 0),
  failures bigint not null default 0 check (failures >= 0),
  dead bigint not null default 0 check (dead >= 0),
  writer xid8 not null default pg_current_xact_id(),
  was_parked boolean not null default false,
  handler xid8,
  handed_over bigint[] check (cardinality(handed_over) between 1 and 10000),
  primary key (consumer_id, partition, generation),
  check ((handler is null) = (handed_over is null))
);
comment on table pgonce.progress is 'How far each consumer has come. Appended by the holder of the offset lock; the newest generation is in force (view consumer_offsets). Its number also tells a stale statement from a fresh one (receive.sql).';
comment on column pgonce.progress.consumer_id is 'The consumer.';
comment on column pgonce.progress.partition is 'The partition.';
comment on column pgonce.progress.generation is 'Rises by one with each change.';
comment on column pgonce.progress.next_offset is 'Offset of the next message to receive.';
comment on column pgonce.progress.received is 'Messages received, ever, without duplicates.';
comment on column pgonce.progress.duplicates is 'Messages left out, ever, because they were processed before.';
comment on column pgonce.progress.failures is 'Attempts that failed, ever.';
comment on column pgonce.progress.dead is 'Messages that became dead letters, ever.';
comment on column pgonce.progress.writer is 'The transaction that wrote this generation: by it receive notices that one statement runs it twice, and fail and hand_over know what their transaction has received.';
comment on column pgonce.progress.was_parked is 'Whether the last batch was of messages that had failed before: then it is the turn of new ones.';
comment on column pgonce.progress.handler is 'At most once: the transaction of the handler that is at messages which are recorded as processed; its COMMIT brings a generation without it. Where that transaction is over and this is still the newest generation, it was rolled back.';
comment on column pgonce.progress.handed_over is 'The offsets of these messages.';

create table pgonce.leases (
  epoch bigint not null default 0 check (epoch >= 0),
  leased_until timestamptz,
  careful_until bigint not null default 0,
  tried_offset bigint,
  fenced bigint not null default 0 check (fenced >= 0),
  owner uuid,
  consumer_id integer not null,
  partition integer not null,
  was_member boolean not null default false,
  primary key (consumer_id, partition),
  check ((owner is null) = (leased_until is null)),
  check (tried_offset is null or owner is not null)
) with (fillfactor = 50);
comment on table pgonce.leases is 'Who is at which partition of an external consumer. Changed only by the holder of the offset lock; the epoch decides who may write, and time only who may try next.';
comment on column pgonce.leases.epoch is 'Rises by one whenever somebody acquires the partition: what comes with an earlier one is refused.';
comment on column pgonce.leases.leased_until is 'From then on others may acquire it, by the database''s clock. Until one does, the owner still has it.';
comment on column pgonce.leases.careful_until is 'Up to this offset messages are handed out one by one: an owner before has left without a word, perhaps because of one of them.';
comment on column pgonce.leases.tried_offset is 'The message that was handed out by itself: whoever takes over from an owner that left without a word charges it with an attempt.';
comment on column pgonce.leases.fenced is 'Writes that were refused because somebody else had acquired the partition, ever.';
comment on column pgonce.leases.owner is 'Who has it; null while nobody does.';
comment on column pgonce.leases.consumer_id is 'The consumer.';
comment on column pgonce.leases.partition is 'The partition.';
comment on column pgonce.leases.was_member is 'Whether the owner said that it lives (beat): then the lease ends with it, too.';

create table pgonce.processed_ids (
  "offset" bigint,
  processed_at timestamptz not null default clock_timestamp(),
  consumer_id integer not null,
  partition integer,
  message_id text collate "C" not null check (octet_length(message_id) between 1 and 255),
  primary key (consumer_id, message_id),
  check (("offset" is null) = (partition is null))
);
comment on table pgonce.processed_ids is 'What each consumer has processed: written in the transaction that applies the effect.';
comment on column pgonce.processed_ids."offset" is 'Where the message stood; null in an inbox.';
comment on column pgonce.processed_ids.processed_at is 'When it was processed.';
comment on column pgonce.processed_ids.consumer_id is 'The consumer.';
comment on column pgonce.processed_ids.partition is 'The partition in which it stood; null in an inbox.';
comment on column pgonce.processed_ids.message_id is 'The message.';

create table pgonce.parked (
  "offset" bigint not null check ("offset" >= 1),
  enqueued_at timestamptz not null,
  parked_at timestamptz not null default clock_timestamp(),
  due_at timestamptz,
  taken_by xid8,
  consumer_id integer not null,
  partition integer not null,
  attempts integer not null check (attempts >= 0),
  bytes integer not null,
  message_id text collate "C" not null,
  key text collate "C",
  error text,
  payload jsonb not null,
  headers jsonb,
  is_suspect boolean not null default false,
  primary key (consumer_id, partition, "offset")
);
create index parked_due on pgonce.parked (consumer_id, partition, due_at, "offset") where due_at is not null and taken_by is null;
create index parked_key on pgonce.parked (consumer_id, partition, key, "offset") where taken_by is null;
create index parked_taken on pgonce.parked (consumer_id, partition, "offset") where taken_by is not null;
comment on table pgonce.parked is 'Messages that wait to be tried again, and those that wait behind them, with copies of their own: the queue may be cleaned up meanwhile.';
comment on column pgonce.parked."offset" is 'Where it stands in the partition. It may lie ahead of the consumer, which leaves it out when it gets there.';
comment on column pgonce.parked.enqueued_at is 'When it was enqueued.';
comment on column pgonce.parked.parked_at is 'When it was parked.';
comment on column pgonce.parked.due_at is 'When it is tried again; null while it waits behind another one of its key.';
comment on column pgonce.parked.taken_by is 'The transaction that has received it. If that committed, the message is processed, and the next receive removes the row.';
comment on column pgonce.parked.consumer_id is 'The consumer.';
comment on column pgonce.parked.partition is 'The partition.';
comment on column pgonce.parked.attempts is 'Attempts that have failed.';
comment on column pgonce.parked.bytes is 'Size of payload and headers before compression.';
comment on column pgonce.parked.message_id is 'Its id.';
comment on column pgonce.parked.key is 'Its key.';
comment on column pgonce.parked.error is 'How the last attempt failed.';
comment on column pgonce.parked.payload is 'Its payload.';
comment on column pgonce.parked.headers is 'Its headers.';
comment on column pgonce.parked.is_suspect is 'Whether a process died of it: it is tried by itself from then on.';
create index parked_suspect on pgonce.parked (consumer_id, partition) where is_suspect and taken_by is null;

create table pgonce.dead_letters (
  dead_letter_id bigint generated always as identity primary key,
  "offset" bigint not null check ("offset" >= 1),
  enqueued_at timestamptz not null,
  failed_at timestamptz not null default clock_timestamp(),
  settled_at timestamptz,
  consumer_id integer not null,
  partition integer not null,
  attempts integer not null check (attempts >= 0),
  bytes integer not null,
  state text collate "C" not null default 'dead' check (state in ('dead', 'replayed', 'discarded')),
  message_id text collate "C" not null,
  key text collate "C",
  error text not null,
  settled_by name,
  payload jsonb not null,
  headers jsonb,
  check ((state = 'dead') = (settled_at is null)),
  check ((settled_at is null) = (settled_by is null))
);
create unique index dead_letters_dead on pgonce.dead_letters (consumer_id, partition, "offset") where state = 'dead';
create index dead_letters_offset on pgonce.dead_letters (consumer_id, partition, "offset");
comment on table pgonce.dead_letters is 'Messages that a consumer has given up, with copies of their own. A row stays when somebody replays or discards it, and says who did that, and when.';
comment on column pgonce.dead_letters.dead_letter_id is 'Names it for replay and discard.';
comment on column pgonce.dead_letters."offset" is 'Where the message stands in the partition.';
comment on column pgonce.dead_letters.enqueued_at is 'When it was enqueued.';
comment on column pgonce.dead_letters.failed_at is 'When its last attempt failed.';
comment on column pgonce.dead_letters.settled_at is 'When it was replayed or discarded.';
comment on column pgonce.dead_letters.consumer_id is 'The consumer.';
comment on column pgonce.dead_letters.partition is 'The partition.';
comment on column pgonce.dead_letters.attempts is 'Attempts that have failed.';
comment on column pgonce.dead_letters.bytes is 'Size of payload and headers before compression.';
comment on column pgonce.dead_letters.state is 'dead, until somebody has replayed or discarded it.';
comment on column pgonce.dead_letters.message_id is 'Its id.';
comment on column pgonce.dead_letters.key is 'Its key.';
comment on column pgonce.dead_letters.error is 'How the last attempt failed, with the causes.';
comment on column pgonce.dead_letters.settled_by is 'The role that replayed or discarded it.';
comment on column pgonce.dead_letters.payload is 'Its payload.';
comment on column pgonce.dead_letters.headers is 'Its headers.';

create table pgonce.members (
  member_id uuid primary key,
  pid integer not null,
  consumers text[] not null,
  joined_at timestamptz not null default clock_timestamp(),
  beat_at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);
comment on table pgonce.members is 'Processes that run consumers, while they run. One that ends without a farewell has died, perhaps of a message.';
comment on column pgonce.members.member_id is 'The process, or rather this start of it.';
comment on column pgonce.members.pid is 'The backend on which it last said that it lives.';
comment on column pgonce.members.consumers is 'The consumers that it runs.';
comment on column pgonce.members.joined_at is 'When it began.';
comment on column pgonce.members.beat_at is 'When it last said that it lives, by the database''s clock. Decides who tries when, and nothing else.';

create table pgonce.suspicions (
  until_offset bigint not null,
  tried_offset bigint,
  tried_by uuid,
  tried_at timestamptz,
  consumer_id integer not null,
  partition integer not null,
  tried_pid integer,
  messages integer not null check (messages between 1 and 10000),
  raised_at timestamptz not null default clock_timestamp(),
  primary key (consumer_id, partition),
  check (tried_offset is null or tried_by is not null)
);
comment on table pgonce.suspicions is 'Where a process may have died of a message: there consumers go on in ranges that are written down first, and halved with each process that dies of one.';
comment on column pgonce.suspicions.until_offset is 'The message has a lower offset than this, or is parked.';
comment on column pgonce.suspicions.tried_offset is 'The message that is tried by itself, if it is only one.';
comment on column pgonce.suspicions.tried_by is 'The process that tries; null while none does.';
comment on column pgonce.suspicions.tried_at is 'When that was last written down.';
comment on column pgonce.suspicions.tried_pid is 'By which session: while it is there, its process lives, also where the connection that says so was lost.';
comment on column pgonce.suspicions.consumer_id is 'The consumer.';
comment on column pgonce.suspicions.partition is 'The partition.';
comment on column pgonce.suspicions.messages is 'How many messages are tried together.';
comment on column pgonce.suspicions.raised_at is 'When it began.';

create table pgonce.duplicate_receipts (
  received_at timestamptz not null default clock_timestamp(),
  messages bigint not null default 1 check (messages > 0),
  consumer_id integer not null,
  message_id text collate "C"
);
create index duplicate_receipts_consumer on pgonce.duplicate_receipts (consumer_id, received_at) include (messages);
comment on table pgonce.duplicate_receipts is 'One row for each message that process_once refused because its id was known; those that are older than 10 minutes are added up.';
comment on column pgonce.duplicate_receipts.received_at is 'When it came again.';
comment on column pgonce.duplicate_receipts.messages is 'How many the row stands for.';
comment on column pgonce.duplicate_receipts.consumer_id is 'The inbox.';
comment on column pgonce.duplicate_receipts.message_id is 'The id that came again; null where the row stands for several.';

create table pgonce.samples (
  sampled_at timestamptz not null,
  applied bigint,
  duplicates bigint not null,
  retries bigint,
  dead_letters bigint,
  fenced bigint,
  id integer not null,
  stage text collate "C" not null check (stage in ('relay', 'consumer')),
  primary key (stage, id, sampled_at)
);
create index samples_sampled_at on pgonce.samples (sampled_at);
comment on table pgonce.samples is 'What the view counters showed in the last hour, about every 10 seconds: what the view rates compares with.';
comment on column pgonce.samples.sampled_at is 'When, by the database''s clock.';
comment on column pgonce.samples.applied is 'As in the view counters, and so are the next four.';
comment on column pgonce.samples.duplicates is 'See applied.';
comment on column pgonce.samples.retries is 'See applied.';
comment on column pgonce.samples.dead_letters is 'See applied.';
comment on column pgonce.samples.fenced is 'See applied.';
comment on column pgonce.samples.id is 'The topic, or the consumer.';
comment on column pgonce.samples.stage is 'relay, of a topic, or consumer.';

create table pgonce.handler_times (
  recorded_at timestamptz not null default clock_timestamp(),
  limit_ms bigint not null check (limit_ms > 0),
  consumer_id integer not null,
  buckets integer[] not null,
  calls bigint[] not null check (cardinality(calls) = cardinality(buckets))
);
create index handler_times_recorded_at on pgonce.handler_times (recorded_at);
comment on table pgonce.handler_times is 'What the calls of handlers took in the last hour. Each worker adds a row for each consumer about every 10 seconds.';
comment on column pgonce.handler_times.recorded_at is 'When, by the database''s clock.';
comment on column pgonce.handler_times.limit_ms is 'What a call may take, in milliseconds.';
comment on column pgonce.handler_times.consumer_id is 'The consumer.';
comment on column pgonce.handler_times.buckets is 'Lengths of time: bucket b holds the calls that took up to 2 ^ (b / 4) microseconds, and longer than b - 1 does.';
comment on column pgonce.handler_times.calls is 'The number of calls in each of the buckets.';

create table pgonce.word_counts (
  consumer text collate "C" not null,
  word text collate "C" not null,
  count bigint not null check (count > 0),
  primary key (consumer, word)
) with (fillfactor = 90);
comment on table pgonce.word_counts is 'The effect of the built-in word count.';
comment on column pgonce.word_counts.consumer is 'The consumer that counted.';
comment on column pgonce.word_counts.word is 'The word.';
comment on column pgonce.word_counts.count is 'How often it came.';
