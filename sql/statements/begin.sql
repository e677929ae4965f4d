-- A program that is silent before its COMMIT was stopped, or cut off: others wait for what it has locked.
begin isolation level read committed;
set local idle_in_transaction_session_timeout = '30s'
