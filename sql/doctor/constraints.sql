-- Constraints and indexes, held against those that the migrations make. A test holds this list against them.
--
-- Keys are compared by what they are of, and checks and foreign keys by their names: how PostgreSQL writes an expression
-- may differ from version to version. What is there has to be enforced, validated and valid, and not deferrable, since
-- ON CONFLICT takes no deferrable key.
with expected_constraints (relation, name, definition) as (values
  ('schema_versions', 'schema_versions_pkey', 'PRIMARY KEY (version)'),
  ('schema_versions', 'schema_versions_version_check', 'CHECK ((version > 0))'),
  ('topics', 'topics_pkey', 'PRIMARY KEY (topic_id)'),
  ('topics', 'topics_partitions_check', 'CHECK (((partitions >= 1) AND (partitions <= 1024)))'),
  ('topics', 'topics_payload_bytes_max_check', 'CHECK (((payload_bytes_max >= 1) AND (payload_bytes_max <= 67108864)))'),
  ('topics', 'topics_topic_check', 'CHECK (((octet_length(topic) >= 1) AND (octet_length(topic) <= 255)))'),
  ('topics', 'topics_topic_key', 'UNIQUE (topic)'),
  ('partitions', 'partitions_pkey', 'PRIMARY KEY (topic_id, partition)'),
  ('partitions', 'partitions_partition_check', 'CHECK ((partition >= 0))'),
  ('partitions', 'partitions_topic_id_fkey', 'FOREIGN KEY (topic_id) REFERENCES pgonce.topics(topic_id)'),
  ('outbox', 'outbox_pkey', 'PRIMARY KEY (topic_id, message_id)'),
  ('outbox', 'outbox_bytes_check', 'CHECK (((bytes >= 1) AND (bytes <= 67150000)))'),
  ('outbox', 'outbox_check', 'CHECK (((status = ''SCHEDULED''::text) = (deliver_at IS NOT NULL)))'),
  ('outbox', 'outbox_headers_check', 'CHECK (((jsonb_typeof(headers) = ''object''::text) AND (pg_column_size(headers) <= 16384)))'),
  ('outbox', 'outbox_key_check', 'CHECK (((octet_length(key) >= 1) AND (octet_length(key) <= 255)))'),
  ('outbox', 'outbox_message_id_check', 'CHECK (((octet_length(message_id) >= 1) AND (octet_length(message_id) <= 255)))'),
  ('outbox', 'outbox_status_check', 'CHECK ((status = ANY (ARRAY[''SCHEDULED''::text, ''PENDING''::text, ''SENT''::text])))'),
  ('duplicate_sends', 'duplicate_sends_messages_check', 'CHECK ((messages > 0))'),
  ('heads', 'heads_pkey', 'PRIMARY KEY (topic_id, partition, generation)'),
  ('heads', 'heads_check', 'CHECK ((scanned <= floor))'),
  ('heads', 'heads_check1', 'CHECK ((cardinality(open_xids) = cardinality(open_from)))'),
  ('heads', 'heads_check2', 'CHECK (((candidate_seq IS NULL) = (candidate_xid IS NULL)))'),
  ('heads', 'heads_generation_check', 'CHECK ((generation >= 0))'),
  ('heads', 'heads_moved_check', 'CHECK ((moved >= 0))'),
  ('heads', 'heads_next_offset_check', 'CHECK ((next_offset >= 1))'),
  ('heads', 'heads_scanned_check', 'CHECK ((scanned >= 0))'),
  ('queue', 'queue_pkey', 'PRIMARY KEY (topic_id, partition, "offset")'),
  ('queue', 'queue_offset_check', 'CHECK (("offset" >= 1))'),
  ('queue', 'queue_message_id_key', 'UNIQUE (topic_id, message_id)'),
  ('consumers', 'consumers_pkey', 'PRIMARY KEY (consumer_id)'),
  ('consumers', 'consumers_attempts_max_check', 'CHECK (((attempts_max >= 1) AND (attempts_max <= 1000)))'),
  ('consumers', 'consumers_backoff_min_ms_check', 'CHECK (((backoff_min_ms >= 1) AND (backoff_min_ms <= 86400000)))'),
  ('consumers', 'consumers_check', 'CHECK (((backoff_max_ms >= backoff_min_ms) AND (backoff_max_ms <= 86400000)))'),
  ('consumers', 'consumers_check1', 'CHECK (((kind = ''transactional''::text) OR (topic_id IS NOT NULL)))'),
  ('consumers', 'consumers_consumer_check', 'CHECK (((octet_length(consumer) >= 1) AND (octet_length(consumer) <= 255)))'),
  ('consumers', 'consumers_delivery_check', 'CHECK ((delivery = ANY (ARRAY[''exactly_once''::text, ''at_least_once''::text, ''at_most_once''::text])))'),
  ('consumers', 'consumers_failure_policy_check', 'CHECK ((failure_policy = ANY (ARRAY[''park_key''::text, ''block''::text, ''skip''::text])))'),
  ('consumers', 'consumers_kind_check', 'CHECK ((kind = ANY (ARRAY[''transactional''::text, ''external''::text])))'),
  ('consumers', 'consumers_topic_id_fkey', 'FOREIGN KEY (topic_id) REFERENCES pgonce.topics(topic_id)'),
  ('consumers', 'consumers_consumer_key', 'UNIQUE (consumer)'),
  ('consumer_partitions', 'consumer_partitions_pkey', 'PRIMARY KEY (consumer_id, partition)'),
  ('consumer_partitions', 'consumer_partitions_partition_check', 'CHECK ((partition >= 0))'),
  ('consumer_partitions', 'consumer_partitions_consumer_id_fkey', 'FOREIGN KEY (consumer_id) REFERENCES pgonce.consumers(consumer_id)'),
  ('progress', 'progress_pkey', 'PRIMARY KEY (consumer_id, partition, generation)'),
  ('progress', 'progress_check', 'CHECK (((handler IS NULL) = (handed_over IS NULL)))'),
  ('progress', 'progress_dead_check', 'CHECK ((dead >= 0))'),
  ('progress', 'progress_duplicates_check', 'CHECK ((duplicates >= 0))'),
  ('progress', 'progress_failures_check', 'CHECK ((failures >= 0))'),
  ('progress', 'progress_generation_check', 'CHECK ((generation >= 0))'),
  ('progress', 'progress_handed_over_check', 'CHECK (((cardinality(handed_over) >= 1) AND (cardinality(handed_over) <= 10000)))'),
  ('progress', 'progress_next_offset_check', 'CHECK ((next_offset >= 1))'),
  ('progress', 'progress_received_check', 'CHECK ((received >= 0))'),
  ('leases', 'leases_pkey', 'PRIMARY KEY (consumer_id, partition)'),
  ('leases', 'leases_check', 'CHECK (((owner IS NULL) = (leased_until IS NULL)))'),
  ('leases', 'leases_check1', 'CHECK (((tried_offset IS NULL) OR (owner IS NOT NULL)))'),
  ('leases', 'leases_epoch_check', 'CHECK ((epoch >= 0))'),
  ('leases', 'leases_fenced_check', 'CHECK ((fenced >= 0))'),
  ('processed_ids', 'processed_ids_pkey', 'PRIMARY KEY (consumer_id, message_id)'),
  ('processed_ids', 'processed_ids_check', 'CHECK ((("offset" IS NULL) = (partition IS NULL)))'),
  ('processed_ids', 'processed_ids_message_id_check', 'CHECK (((octet_length(message_id) >= 1) AND (octet_length(message_id) <= 255)))'),
  ('parked', 'parked_pkey', 'PRIMARY KEY (consumer_id, partition, "offset")'),
  ('parked', 'parked_attempts_check', 'CHECK ((attempts >= 0))'),
  ('parked', 'parked_offset_check', 'CHECK (("offset" >= 1))'),
  ('dead_letters', 'dead_letters_pkey', 'PRIMARY KEY (dead_letter_id)'),
  ('dead_letters', 'dead_letters_attempts_check', 'CHECK ((attempts >= 0))'),
  ('dead_letters', 'dead_letters_check', 'CHECK (((state = ''dead''::text) = (settled_at IS NULL)))'),
  ('dead_letters', 'dead_letters_check1', 'CHECK (((settled_at IS NULL) = (settled_by IS NULL)))'),
  ('dead_letters', 'dead_letters_offset_check', 'CHECK (("offset" >= 1))'),
  ('dead_letters', 'dead_letters_state_check', 'CHECK ((state = ANY (ARRAY[''dead''::text, ''replayed''::text, ''discarded''::text])))'),
  ('members', 'members_pkey', 'PRIMARY KEY (member_id)'),
  ('suspicions', 'suspicions_pkey', 'PRIMARY KEY (consumer_id, partition)'),
  ('suspicions', 'suspicions_check', 'CHECK (((tried_offset IS NULL) OR (tried_by IS NOT NULL)))'),
  ('suspicions', 'suspicions_messages_check', 'CHECK (((messages >= 1) AND (messages <= 10000)))'),
  ('duplicate_receipts', 'duplicate_receipts_messages_check', 'CHECK ((messages > 0))'),
  ('samples', 'samples_pkey', 'PRIMARY KEY (stage, id, sampled_at)'),
  ('samples', 'samples_stage_check', 'CHECK ((stage = ANY (ARRAY[''relay''::text, ''consumer''::text])))'),
  ('handler_times', 'handler_times_check', 'CHECK ((cardinality(calls) = cardinality(buckets)))'),
  ('handler_times', 'handler_times_limit_ms_check', 'CHECK ((limit_ms > 0))'),
  ('word_counts', 'word_counts_pkey', 'PRIMARY KEY (consumer, word)'),
  ('word_counts', 'word_counts_count_check', 'CHECK ((count > 0))'),
  ('queue_floors', 'queue_floors_pkey', 'PRIMARY KEY (topic_id, partition)'),
  ('queue_floors', 'queue_floors_floor_check', 'CHECK ((floor >= 1))'),
  ('state_tables', 'state_tables_pkey', 'PRIMARY KEY (consumer_id, relation)'),
  ('state_tables', 'state_tables_consumer_id_fkey', 'FOREIGN KEY (consumer_id) REFERENCES pgonce.consumers(consumer_id)'),
  ('checkpoints', 'checkpoints_pkey', 'PRIMARY KEY (checkpoint_id)'),
  ('checkpoints', 'checkpoints_checkpoint_check', 'CHECK (((octet_length(checkpoint) >= 1) AND (octet_length(checkpoint) <= 255)))'),
  ('checkpoints', 'checkpoints_row_count_check', 'CHECK ((row_count >= 0))'),
  ('checkpoints', 'checkpoints_consumer_id_fkey', 'FOREIGN KEY (consumer_id) REFERENCES pgonce.consumers(consumer_id)'),
  ('checkpoints', 'checkpoints_consumer_id_checkpoint_key', 'UNIQUE (consumer_id, checkpoint)'),
  ('checkpoint_offsets', 'checkpoint_offsets_pkey', 'PRIMARY KEY (checkpoint_id, partition)'),
  ('checkpoint_tables', 'checkpoint_tables_pkey', 'PRIMARY KEY (checkpoint_id, relation)')
),
expected_indexes (relation, name, definition) as (values
  ('outbox', 'outbox_in_order', 'CREATE INDEX outbox_in_order ON pgonce.outbox USING btree (topic_id, partition, seq)'),
  ('outbox', 'outbox_scheduled', 'CREATE INDEX outbox_scheduled ON pgonce.outbox USING btree (topic_id, partition, deliver_at, seq) WHERE (deliver_at IS NOT NULL)'),
  ('duplicate_sends', 'duplicate_sends_topic', 'CREATE INDEX duplicate_sends_topic ON pgonce.duplicate_sends USING btree (topic_id, sent_at) INCLUDE (messages)'),
  ('set_aside', 'set_aside_topic', 'CREATE INDEX set_aside_topic ON pgonce.set_aside USING btree (topic_id, set_aside_at)'),
  ('parked', 'parked_due', 'CREATE INDEX parked_due ON pgonce.parked USING btree (consumer_id, partition, due_at, "offset") WHERE ((due_at IS NOT NULL) AND (taken_by IS NULL))'),
  ('parked', 'parked_key', 'CREATE INDEX parked_key ON pgonce.parked USING btree (consumer_id, partition, key, "offset") WHERE (taken_by IS NULL)'),
  ('parked', 'parked_taken', 'CREATE INDEX parked_taken ON pgonce.parked USING btree (consumer_id, partition, "offset") WHERE (taken_by IS NOT NULL)'),
  ('parked', 'parked_suspect', 'CREATE INDEX parked_suspect ON pgonce.parked USING btree (consumer_id, partition) WHERE (is_suspect AND (taken_by IS NULL))'),
  ('dead_letters', 'dead_letters_dead', 'CREATE UNIQUE INDEX dead_letters_dead ON pgonce.dead_letters USING btree (consumer_id, partition, "offset") WHERE (state = ''dead''::text)'),
  ('dead_letters', 'dead_letters_offset', 'CREATE INDEX dead_letters_offset ON pgonce.dead_letters USING btree (consumer_id, partition, "offset")'),
  ('duplicate_receipts', 'duplicate_receipts_consumer', 'CREATE INDEX duplicate_receipts_consumer ON pgonce.duplicate_receipts USING btree (consumer_id, received_at) INCLUDE (messages)'),
  ('samples', 'samples_sampled_at', 'CREATE INDEX samples_sampled_at ON pgonce.samples USING btree (sampled_at)'),
  ('handler_times', 'handler_times_recorded_at', 'CREATE INDEX handler_times_recorded_at ON pgonce.handler_times USING btree (recorded_at)'),
  ('checkpoint_parts', 'checkpoint_parts_relation', 'CREATE INDEX checkpoint_parts_relation ON pgonce.checkpoint_parts USING btree (checkpoint_id, relation)')
),
tables as (
  select c.oid, c.relname
  from pg_class c
  where c.relkind in ('r', 'p')
    and c.relnamespace = (select h.relnamespace from pg_class h where h.oid = 'pgonce.schema_versions'::regclass)
),
-- Missing ones are of no use where their table is missing, which another check finds.
constraints as (
  select
    e.relation,
    e.name,
    e.definition,
    other.conname as other_name,
    case
      when other.conname is not null then format('is named %I', other.conname)
      when k.oid is null then 'is missing'
      when e.definition ~ '^(PRIMARY|UNIQUE)' and pg_get_constraintdef(k.oid) <> e.definition
        then 'was altered: ' || pg_get_constraintdef(k.oid)
      when not k.convalidated then 'is not validated'
      -- A column of PostgreSQL 18.
      when (to_jsonb(k) ->> 'conenforced') = 'false' then 'is not enforced'
      when i.indisvalid is false or i.indisready is false then 'has an invalid index'
    end as finding,
    case
      when other.conname is not null
        then format('alter table pgonce.%I rename constraint %I to %I', e.relation, other.conname, e.name)
      when k.oid is not null and not k.convalidated and e.definition !~ '^(PRIMARY|UNIQUE)'
        then format('alter table pgonce.%I validate constraint %I', e.relation, e.name)
      when i.indisvalid is false or i.indisready is false then format('reindex index pgonce.%I', e.name)
      else format('alter table pgonce.%I %sadd constraint %I %s', e.relation,
                  case when k.oid is not null then format('drop constraint %I, ', e.name) else '' end, e.name, e.definition)
    end as remedy
  from expected_constraints e
  join tables t on t.relname = e.relation
  left join pg_constraint k on k.conrelid = t.oid and k.conname = e.name
  left join pg_index i on i.indexrelid = k.conindid and k.contype in ('p', 'u')
  left join lateral (
    select x.conname
    from pg_constraint x
    where k.oid is null and x.conrelid = t.oid and pg_get_constraintdef(x.oid) = e.definition
      and x.conname not in (select o.name from expected_constraints o where o.relation = e.relation)
    order by x.conname
    limit 1) other on true
),
indexes as (
  select
    e.relation,
    e.name,
    case
      when x.oid is null then 'is missing'
      when i.indisunique <> (e.definition ~ '^CREATE UNIQUE') or i.indrelid <> t.oid
        or e.definition not like '%(' || keys.columns || ')%' or (e.definition ~ ' WHERE ') <> (i.indpred is not null) then 'was altered'
      when not i.indisvalid or not i.indisready then 'is invalid'
    end as finding,
    case
      when x.oid is null then e.definition
      when not i.indisvalid or not i.indisready then format('reindex index pgonce.%I', e.name)
      else format('drop index pgonce.%I; %s', e.name, e.definition)
    end as remedy
  from expected_indexes e
  join tables t on t.relname = e.relation
  left join pg_class x on x.relname = e.name and x.relkind in ('i', 'I') and x.relnamespace = (
    select c.relnamespace from pg_class c where c.oid = t.oid)
  left join pg_index i on i.indexrelid = x.oid
  cross join lateral (
    select string_agg(pg_get_indexdef(x.oid, n, true), ', ' order by n) as columns from generate_series(1, i.indnkeyatts) n) keys
)
select
  case
    when k.name = 'outbox_pkey' then 'producer-deduplication'
    when k.name in ('queue_message_id_key', 'queue_pkey') then 'queue-deduplication'
    when k.name in ('processed_ids_pkey', 'progress_pkey') then 'consumer-deduplication'
    else 'constraints'
  end as "check",
  format('constraint %s of table %s %s', k.name, k.relation, k.finding) as subject,
  k.remedy
from constraints k
where k.finding is not null
union all
select 'indexes', format('index %s of table %s %s', x.name, x.relation, x.finding), x.remedy
from indexes x
where x.finding is not null
union all
-- Those that are none of pgonce refuse what it writes. (NOT NULL has constraints since PostgreSQL 18.)
select 'constraints', format('constraint %I of table %I is none of pgonce', k.conname, t.relname),
       format('alter table pgonce.%I drop constraint %I', t.relname, k.conname)
from pg_constraint k
join tables t on t.oid = k.conrelid
where k.contype in ('c', 'f', 'p', 'u', 'x')
  and t.relname in (select e.relation from expected_constraints e)
  and not exists (select from expected_constraints e where e.relation = t.relname and e.name = k.conname)
  and not exists (select from constraints c where c.relation = t.relname and c.other_name = k.conname)
union all
select 'indexes', format('unique index %I of table %I is none of pgonce', x.relname, t.relname),
       format('drop index pgonce.%I', x.relname)
from pg_index i
join tables t on t.oid = i.indrelid
join pg_class x on x.oid = i.indexrelid
where i.indisunique and not exists (select from pg_constraint k where k.conindid = i.indexrelid)
  and not exists (select from expected_indexes e where e.relation = t.relname and e.name = x.relname)
order by 1, 2
