-- The row types that the functions of version 1 return.

create type pgonce.enqueued as (message_id text, was_duplicate boolean);
comment on type pgonce.enqueued is 'What enqueue answers.';
create type pgonce.enqueued_item as ("position" integer, message_id text, was_duplicate boolean);
comment on type pgonce.enqueued_item is 'What enqueue_many answers for each message: its position in the arrays, from 1.';
create type pgonce.cancelled as (message_id text, was_cancelled boolean);
comment on type pgonce.cancelled is 'What cancel answers.';
create type pgonce.relayed as (topic text, partition integer, moved integer, blocked integer);
comment on type pgonce.relayed is 'What relay did in a partition: messages moved to the queue, and messages that wait because another session holds a lock on them or on an earlier one of their key.';
create type pgonce.received_message as (
  consumer text, partition integer, "offset" bigint, message_id text, key text, payload jsonb, headers jsonb,
  enqueued_at timestamptz, attempt integer);
comment on type pgonce.received_message is 'What receive answers, and what the view received shows. attempt: how often it has been tried, this time included.';
create type pgonce.failed as (outcome text, attempts integer, due_at timestamptz, withdrawn bigint[]);
comment on type pgonce.failed is 'What fail has made of a message: parked, dead, or gone (somebody else has settled it). withdrawn: the offsets that this transaction had received, and no longer has.';
create type pgonce.buried as (outcome text);
comment on type pgonce.buried is 'What bury has made of a message: dead, or gone (it is not recorded there, or somebody is at it).';
create type pgonce.acquired as (partition integer, epoch bigint);
comment on type pgonce.acquired is 'What acquire answers: a partition, and the epoch that every later call for it has to carry.';
create type pgonce.peeked as (
  partition integer, "offset" bigint, message_id text, key text, payload jsonb, headers jsonb, enqueued_at timestamptz,
  attempt integer, was_parked boolean);
comment on type pgonce.peeked is 'What peek answers: a message; was_parked: it failed before, or waited behind one that did, and is acknowledged by itself.';
create type pgonce.acked as (outcome text, next_offset bigint);
comment on type pgonce.acked is 'What ack has made of it: acked, gone (it was done before), fenced (somebody else has acquired the partition) or busy (another session is at it: again, a moment later), and the offset from which on messages are not done.';
create type pgonce.nacked as (outcome text, attempts integer, due_at timestamptz);
comment on type pgonce.nacked is 'What nack has made of a message: parked, dead, gone (it is settled), fenced or busy, as for ack.';
create type pgonce.renewed as (outcome text, is_surplus boolean);
comment on type pgonce.renewed is 'What renew answers: renewed, fenced or busy; is_surplus: others have less than their share, and the partition is to be released.';
create type pgonce.released as (outcome text);
comment on type pgonce.released is 'What release answers: released, fenced or busy.';
create type pgonce.suspected as (consumer text);
comment on type pgonce.suspected is 'What beat answers: a consumer of which a process may have died.';
create type pgonce.suspect_range as (partition integer, messages integer, is_suspect boolean);
comment on type pgonce.suspect_range is 'What take_suspicion answers: so many messages of a partition, or one that a process has died of.';
create type pgonce.tried as (failed integer, withdrawn bigint[]);
comment on type pgonce.tried is 'What try_statements answers: how many messages failed, and the offsets that this transaction no longer has received.';
create type pgonce.settled as (dead_letter_id bigint, was_settled boolean);
comment on type pgonce.settled is 'What replay_dead_letters and discard_dead_letters answer: false where somebody else had settled it before.';
create type pgonce.purged as (topic text, unsent bigint, queued bigint);
comment on type pgonce.purged is 'What purge_topic deleted: messages that had not been relayed, and messages of the queue.';
create type pgonce.due as (stage text, name text);
comment on type pgonce.due is 'What watch answers: a stage (relay, consumer) and the name of its topic or consumer.';
create type pgonce.processed as (message_id text, was_duplicate boolean);
comment on type pgonce.processed is 'What process_once answers.';
create type pgonce.rate as (
  stage text, name text, seconds float8, received bigint, applied bigint, duplicates bigint, retries bigint,
  dead_letters bigint, fenced bigint, received_per_minute float8, applied_per_minute float8, duplicates_per_minute float8,
  retries_per_minute float8, dead_letters_per_minute float8, fenced_per_minute float8, lag bigint, oldest_age interval,
  handler_p50_ms float8, handler_p99_ms float8, handler_limit_ms bigint, handler_nears_limit boolean);
comment on type pgonce.rate is 'What the view rates shows of a topic or a consumer.';
create type pgonce.checkpointed as (checkpoint text, taken_at timestamptz, row_count bigint);
comment on type pgonce.checkpointed is 'What checkpoint answers: its name, when it was taken, and how many rows it holds beside the offsets.';
create type pgonce.restored as (partition integer, next_offset bigint, messages bigint);
comment on type pgonce.restored is 'What restore and replay answer for each partition: the offset to go on from, and how many messages come again.';
create type pgonce.difference as (
  part text, name text, messages bigint, added bigint, removed bigint, changed bigint, samples text[]);
comment on type pgonce.difference is 'What checkpoint_difference answers: for each partition how many messages a restore would bring again; for each table how many rows the restore would delete (added since), bring back (removed since) and put back as they were (changed since), and keys of some of them.';
