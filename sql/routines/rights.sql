-- Rights: who may do what. Nobody writes the tables by hand; whoever may call a verb may do what the verb does, no more.
--
-- The verbs are SECURITY DEFINER: they run with the rights of the schema's owner, and for that reason with a
-- search_path of their own and every name qualified. `receive` is not, since it has to be inlined into the caller's
-- statement (receive.sql), so that its caller needs receive_seen and seen_progress as well; nor are apply_statements and try_statements, since
-- the statements of a consumer have the rights of whoever runs it. The other internal functions
-- run inside a verb, with its rights and its search_path, and need no grant.
--
-- PostgreSQL lets everybody execute a new function; from here on nobody may but the owner and those whom an operator
-- names (README, "Roles"). What was granted to a role stays at an upgrade. Last of all, since it is about all functions.

revoke execute on all functions in schema pgonce from public;
