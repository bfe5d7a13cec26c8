//! Cedar with one policy; everything else is entities. Both encodings are what its users write.

use std::collections::{HashMap, HashSet};

use cedar_policy::{
    Authorizer, Context, Decision, Entities, Entity, EntityId, EntityTypeName, EntityUid, PolicySet, Request,
    RestrictedExpression,
};

use crate::world::{
    AREAS, Grant, Granted, Holder, Question, TASKS, World, group_name, is_suspended, parent, user_name,
};

/// Where the grants are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As Cedar's own examples do it: each task names one group of performers, and who may is put into it.
    Performers,
    /// Each task has the set of the users and groups that may.
    Allowed,
}

pub(crate) struct Cedar {
    authorizer: Authorizer,
    policies: PolicySet,
    entities: Entities,
    names: Names,
}

impl Cedar {
    pub(crate) fn load(world: &World, encoding: Encoding) -> Self {
        let names = Names::new();
        let mut by_holder: HashMap<Holder, Vec<Granted>> = HashMap::new();
        let mut by_granted: HashMap<Granted, Vec<Holder>> = HashMap::new();
        for Grant { holder, granted, .. } in world.live_grants() {
            by_holder.entry(*holder).or_default().push(*granted);
            by_granted.entry(*granted).or_default().push(*holder);
        }
        let performs = |holder: Holder| -> HashSet<EntityUid> {
            if encoding == Encoding::Allowed {
                return HashSet::new();
            }
            by_holder.get(&holder).into_iter().flatten().map(|granted| names.performers(*granted)).collect()
        };

        let users = (1..=world.shape.users).map(|user| {
            let mut parents = performs(Holder::User(user));
            parents.extend(world.groups_of(user).map(|group| names.group(group)));
            let active = RestrictedExpression::new_bool(!is_suspended(user));
            Entity::new(names.user(user), HashMap::from([("active".to_owned(), active)]), parents).unwrap()
        });
        let groups = (1..=world.shape.groups).map(|group| {
            let mut parents = performs(Holder::Group(group));
            parents.extend(parent(group).map(|parent| names.group(parent)));
            Entity::new_no_attrs(names.group(group), parents)
        });
        let who = |granted: Granted| match encoding {
            Encoding::Performers => RestrictedExpression::new_entity_uid(names.performers(granted)),
            Encoding::Allowed => RestrictedExpression::new_set(
                by_granted
                    .get(&granted)
                    .into_iter()
                    .flatten()
                    .map(|holder| RestrictedExpression::new_entity_uid(names.holder(*holder))),
            ),
        };
        let areas = (0..AREAS).map(|area| {
            let who = who(Granted::Area(area));
            Entity::new(names.area(area), HashMap::from([("who".to_owned(), who)]), HashSet::new()).unwrap()
        });
        let tasks = (1..=TASKS).map(|task| {
            let area = RestrictedExpression::new_entity_uid(names.area(task % AREAS));
            let attributes =
                HashMap::from([("who".to_owned(), who(Granted::Task(task))), ("area".to_owned(), area)]);
            Entity::new(names.task(task), attributes, HashSet::new()).unwrap()
        });
        let entities = Entities::from_entities(users.chain(groups).chain(areas).chain(tasks), None).unwrap();
        let policies = r#"
            permit (principal, action == Action::"perform", resource)
            when { principal.active && (principal in resource.who || principal in resource.area.who) };
        "#;
        Self { authorizer: Authorizer::new(), policies: policies.parse().unwrap(), entities, names }
    }

    pub(crate) fn requests(&self, questions: &[Question]) -> Vec<Request> {
        questions
            .iter()
            .map(|question| {
                let (user, task) = (self.names.user(question.user_number), self.names.task(question.task));
                Request::new(user, self.names.perform.clone(), task, Context::empty(), None).unwrap()
            })
            .collect()
    }

    pub(crate) fn allows(&self, request: &Request) -> bool {
        self.authorizer.is_authorized(request, &self.policies, &self.entities).decision() == Decision::Allow
    }
}

/// The types' names, parsed once.
struct Names {
    user: EntityTypeName,
    group: EntityTypeName,
    performers: EntityTypeName,
    area: EntityTypeName,
    task: EntityTypeName,
    perform: EntityUid,
}

impl Names {
    fn new() -> Self {
        Self {
            user: "User".parse().unwrap(),
            group: "Group".parse().unwrap(),
            performers: "Performers".parse().unwrap(),
            area: "Area".parse().unwrap(),
            task: "Task".parse().unwrap(),
            perform: r#"Action::"perform""#.parse().unwrap(),
        }
    }

    fn user(&self, user: u32) -> EntityUid {
        EntityUid::from_type_name_and_id(self.user.clone(), EntityId::new(user_name(user)))
    }

    fn group(&self, group: u32) -> EntityUid {
        EntityUid::from_type_name_and_id(self.group.clone(), EntityId::new(group_name(group)))
    }

    fn holder(&self, holder: Holder) -> EntityUid {
        match holder {
            Holder::User(user) => self.user(user),
            Holder::Group(group) => self.group(group),
        }
    }

    fn performers(&self, granted: Granted) -> EntityUid {
        EntityUid::from_type_name_and_id(self.performers.clone(), EntityId::new(granted.name()))
    }

    fn area(&self, area: u32) -> EntityUid {
        EntityUid::from_type_name_and_id(self.area.clone(), EntityId::new(format!("area{area}")))
    }

    fn task(&self, task: u32) -> EntityUid {
        EntityUid::from_type_name_and_id(self.task.clone(), EntityId::new(Granted::Task(task).name()))
    }
}
