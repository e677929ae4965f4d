//! The schema: installed once however many try, under any name, and described whole.

use pgonce::{
    Consumer, ConsumerSettings, Database, ErrorKind, Migration, Producer, Relay, SCHEMA_VERSION, Schema, TopicSettings,
    check_version, create_consumer, create_topic, migrate,
};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{number, sqlstate, texts, word};

/// Programs that start at once.
const STARTERS: usize = 50;

async fn installed() -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    (database, client)
}

#[tokio::test]
async fn of_many_that_migrate_at_once_one_creates_and_the_others_find_it_done() {
    let database = TestDatabase::empty().await;
    let mut starters = JoinSet::new();
    for _ in 0..STARTERS {
        let mut client = database.connect().await;
        starters.spawn(async move { migrate(&mut client, &Schema::default()).await.expect("migrated") });
    }
    let outcomes = starters.join_all().await;
    let created = outcomes.iter().filter(|outcome| **outcome == Migration::Created).count();
    let current = outcomes.iter().filter(|outcome| **outcome == Migration::Current).count();
    assert_eq!((created, current), (1, STARTERS - 1));
    let client = database.connect().await;
    assert_eq!(number(&client, "select count(*) from pgonce.schema_versions").await, 1);
}

#[tokio::test]
async fn the_version_says_who_installed_it() {
    let (_database, mut client) = installed().await;
    let row = client
        .query_one("select version, program, routines_digest from pgonce.schema_versions", &[])
        .await
        .expect("one row");
    assert_eq!(row.get::<_, i32>(0), SCHEMA_VERSION);
    assert_eq!(row.get::<_, String>(1), env!("CARGO_PKG_VERSION"));
    assert_eq!(row.get::<_, String>(2).len(), 64);
    check_version(&client, &Schema::default()).await.expect("current");
    assert_eq!(migrate(&mut client, &Schema::default()).await.expect("migrated"), Migration::Current);
}

#[tokio::test]
async fn schemas_of_any_name_work_side_by_side() {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    let names = ["pgonce", "Events", "select", "_x9", "USER"];
    for name in names {
        let schema = Schema::new(name).expect("a good name");
        assert_eq!(migrate(&mut client, &schema).await.expect("migrated"), Migration::Created, "{name}");
    }
    for name in names {
        let schema = Schema::new(name).expect("a good name");
        create_topic(&client, &schema, "words", TopicSettings::default()).await.expect("created");
        create_consumer(&client, &schema, "counter", Some("words"), ConsumerSettings::default())
            .await
            .expect("created");
        let producer = Producer::in_schema("words", &schema);
        producer.send(&client, &word(name).id("same id")).await.expect("sent");
        producer.send_all(&client, &[word(name), word(name)]).await.expect("sent");
        let pool = Database::connect(&database.url, schema, 2).expect("a good URL");
        assert_eq!(Relay::topic("words").step(&pool).await.expect("relayed").moved, 3, "{name}");
        let consumer = Consumer::word_count("counter");
        while consumer.step(&pool).await.expect("consumed").applied > 0 {}
    }
    for name in names {
        let counts = format!("select word || count from {name:?}.word_counts");
        assert_eq!(texts(&client, &counts).await, [format!("{name}3")]);
    }
}

#[tokio::test]
async fn nothing_in_a_schema_of_another_name_names_pgonce() {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    migrate(&mut client, &Schema::new("Events").expect("a good name")).await.expect("migrated");
    let strays = r#"
        select p.proname::text from pg_proc p
        where p.pronamespace = '"Events"'::regnamespace and pg_get_functiondef(p.oid) ~ 'pgonce\.'"#;
    assert_eq!(texts(&client, strays).await, [""; 0]);
}

#[tokio::test]
async fn what_is_missing_or_old_is_said_with_the_command_that_helps() {
    let empty = TestDatabase::empty().await;
    let client = empty.connect().await;
    let error = check_version(&client, &Schema::default()).await.expect_err("missing");
    assert_eq!(error.kind(), ErrorKind::SchemaMissing);
    assert!(error.hint().is_some_and(|hint| hint.contains("pgonce init")));
    let error = Producer::new("t").send(&client, &word("a")).await.expect_err("missing");
    assert_eq!(error.kind(), ErrorKind::SchemaMissing);
    assert!(error.hint().is_some_and(|hint| hint.contains("pgonce init")));

    let (_database, client) = installed().await;
    let age = "alter table pgonce.schema_versions drop constraint schema_versions_version_check;
               update pgonce.schema_versions set version = 0";
    client.batch_execute(age).await.expect("an old schema");
    let error = check_version(&client, &Schema::default()).await.expect_err("too old");
    assert_eq!(error.kind(), ErrorKind::SchemaTooOld);
    assert!(error.hint().is_some_and(|hint| hint.contains("pgonce migrate")));

    let (_database, mut client) = installed().await;
    client.batch_execute("delete from pgonce.schema_versions").await.expect("emptied");
    for error in [
        check_version(&client, &Schema::default()).await.expect_err("no version"),
        migrate(&mut client, &Schema::default()).await.expect_err("no version"),
    ] {
        assert_eq!(error.kind(), ErrorKind::SchemaMissing);
        assert!(error.hint().is_some_and(|hint| hint.contains("schema_versions is empty")), "{error}");
    }
}

#[tokio::test]
async fn a_role_that_owns_an_empty_schema_needs_no_other_right() {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    let role = texts(&client, "select current_database()::text || '_role'").await.remove(0);
    client
        .batch_execute(&format!(
            "create role {role}; create schema pgonce authorization {role}; set role {role}; set search_path = ''"
        ))
        .await
        .expect("a role of small means");
    assert_eq!(sqlstate(&client, "create schema other").await, "42501");
    assert_eq!(migrate(&mut client, &Schema::default()).await.expect("migrated"), Migration::Created);
    create_topic(&client, &Schema::default(), "t", TopicSettings::default()).await.expect("created");
    Producer::new("t").send(&client, &word("a")).await.expect("sent");
    client.batch_execute("select * from pgonce.relay()").await.expect("relayed");
    let drop_role = format!("reset role; drop owned by {role}; drop role {role}");
    client.batch_execute(&drop_role).await.expect("dropped");
}

#[tokio::test]
async fn a_migration_that_fails_leaves_nothing() {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    client
        .batch_execute("create schema pgonce; create table pgonce.progress (somebody_elses integer)")
        .await
        .expect("something is in the way");
    migrate(&mut client, &Schema::default()).await.expect_err("a table of that name exists");
    let left = "select count(*) from pg_class where relnamespace = 'pgonce'::regnamespace and relname <> 'progress'";
    assert_eq!(number(&client, left).await, 0);
    client.batch_execute("drop table pgonce.progress").await.expect("out of the way");
    assert_eq!(migrate(&mut client, &Schema::default()).await.expect("migrated"), Migration::Created);
}

#[tokio::test]
async fn every_table_column_view_type_and_function_is_described() {
    let (_database, client) = installed().await;
    for (what, query) in [
        (
            "relations",
            "select c.relname::text from pg_class c
             where c.relnamespace = 'pgonce'::regnamespace and c.relkind in ('r', 'v', 'S')
               and coalesce(obj_description(c.oid, 'pg_class'), '') = ''
               and not exists (select from pg_depend d where d.objid = c.oid and d.deptype = 'i' and c.relkind = 'S')",
        ),
        (
            "columns",
            "select c.relname || '.' || a.attname from pg_class c join pg_attribute a on a.attrelid = c.oid
             where c.relnamespace = 'pgonce'::regnamespace and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped
               and coalesce(col_description(c.oid, a.attnum), '') = ''",
        ),
        (
            "functions",
            "select p.proname::text from pg_proc p
             where p.pronamespace = 'pgonce'::regnamespace and coalesce(obj_description(p.oid, 'pg_proc'), '') = ''",
        ),
        (
            "types",
            "select t.typname::text from pg_type t join pg_class c on c.oid = t.typrelid
             where t.typnamespace = 'pgonce'::regnamespace and c.relkind = 'c'
               and coalesce(obj_description(t.oid, 'pg_type'), '') = ''",
        ),
    ] {
        assert_eq!(texts(&client, query).await, [""; 0], "{what} without a COMMENT");
    }
    assert!(number(&client, "select count(*) from pg_proc where pronamespace = 'pgonce'::regnamespace").await > 20);
}

#[tokio::test]
async fn no_foreign_key_points_at_a_lock() {
    let (_database, client) = installed().await;
    let pointing = "
        select c.conname::text from pg_constraint c
        where c.contype = 'f'
          and c.confrelid in ('pgonce.partitions'::regclass, 'pgonce.consumer_partitions'::regclass)";
    assert_eq!(texts(&client, pointing).await, [""; 0]);
}

#[tokio::test]
async fn sequences_that_order_do_not_cache_and_status_is_in_no_index() {
    let (_database, client) = installed().await;
    let caching = "select sequencename::text from pg_sequences where schemaname = 'pgonce' and cache_size <> 1";
    assert_eq!(texts(&client, caching).await, ["looks"], "which only counts");
    let with_status = "select indexname::text from pg_indexes where schemaname = 'pgonce' and indexdef ~ 'status'";
    assert_eq!(texts(&client, with_status).await, [""; 0]);
}

#[tokio::test]
async fn names_inside_the_functions_are_resolved_by_no_search_path_of_the_caller() {
    let (_database, client) = installed().await;
    // plpgsql reads its text at run time: it needs a path of its own, or that of the function that calls it. SQL
    // functions are either parsed at creation (no text is kept), or set one too. Whatever runs with the owner's rights
    // can be called from outside. What apply_statements is given is to be found by the caller's path.
    let open = "
        select p.proname::text from pg_proc p join pg_language l on l.oid = p.prolang
        where p.pronamespace = 'pgonce'::regnamespace
          and not (l.lanname = 'sql' and p.prosqlbody is not null)
          and p.proname <> 'apply_statements'
          and (p.prosecdef or obj_description(p.oid, 'pg_proc') not like 'Internal:%')
          and not exists (select from unnest(p.proconfig) c where c = 'search_path=pg_catalog, pg_temp')";
    assert_eq!(texts(&client, open).await, [""; 0]);
}

#[tokio::test]
async fn every_verb_has_the_rights_of_the_owner_but_those_that_are_inlined() {
    let (_database, client) = installed().await;
    let with_own_rights = "
        select p.proname::text from pg_proc p
        where p.pronamespace = 'pgonce'::regnamespace and not p.prosecdef
          and obj_description(p.oid, 'pg_proc') not like 'Internal:%'
        order by 1";
    assert_eq!(
        texts(&client, with_own_rights).await,
        ["apply_statements", "emitted_id", "new_message_id", "partition_of", "receive", "try_statements"]
    );
    let inlined = "
        select p.proname::text from pg_proc p join pg_language l on l.oid = p.prolang
        where p.pronamespace = 'pgonce'::regnamespace and l.lanname = 'sql'
          and not p.prosecdef and p.proconfig is null and p.prosqlbody is not null
        order by 1";
    let expected =
        ["binary_size", "has_ended", "is_watched", "message_fault", "new_message_id", "partition_of", "receive"];
    assert_eq!(texts(&client, inlined).await, expected);
}

#[tokio::test]
async fn nobody_but_the_owner_may_do_anything_until_it_is_granted() {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    let open = "
        select p.proname::text from pg_proc p
        where p.pronamespace = '\"Events\"'::regnamespace and has_function_privilege('public', p.oid, 'execute')
        union all
        select c.relname::text from pg_class c
        where c.relnamespace = '\"Events\"'::regnamespace and case
          when c.relkind in ('r', 'v') then has_table_privilege('public', c.oid, 'select, insert, update, delete, truncate')
          when c.relkind = 'S' then has_sequence_privilege('public', c.oid, 'usage, select, update') end
        union all
        select 'schema' where has_schema_privilege('public', 'Events', 'usage, create')";
    let schema = Schema::new("Events").expect("a good name");
    migrate(&mut client, &schema).await.expect("installed");
    assert_eq!(texts(&client, open).await, [""; 0]);
    let upgrade = "update \"Events\".schema_versions set routines_digest = 'another'";
    client.batch_execute(upgrade).await.expect("another program's functions");
    migrate(&mut client, &schema).await.expect("installed again");
    assert_eq!(texts(&client, open).await, [""; 0]);
}
